"""Run folders made of synthetic verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Row = dict[str, Any]
MakeRun = Callable[..., Path]


def judged_row(identifier: str, margins: Sequence[float], *, label: str | None = None, **more: Any) -> Row:
    """A judged row with the given un-swapped log-odds of each order."""
    probabilities = [1 / (1 + np.exp(-margin)) for margin in margins]
    orders = [
        {
            "order": order, "verdict": "A" if margin > 0 else "B", "p_a": float(p), "margin": float(margin),
            "rationale": f"because {identifier}", "forced": False, "votes": {}, "tokens": {"generated": 80},
        }
        for order, margin, p in zip(("ab", "ba"), margins, probabilities, strict=False)
    ]  # fmt: skip
    mean = float(np.mean(probabilities))
    return {
        "id": identifier, "verdict": "A" if mean > 0.5 else "B", "p_a": mean, "margin": float(np.mean(margins)),
        "consistent": len({order["verdict"] for order in orders}) == 1 if len(orders) > 1 else None,
        "reason": None, "flags": [], "orders": orders, "label": label, "meta": {"subset": "all"}, "seconds": 1.0, **more,
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str, rows: Sequence[Row], **record: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if record:
            (folder / "run.json").write_text(json.dumps({"name": name, **record}), encoding="utf-8")
        return folder

    return make
