"""Files of pairs with labels, and what `bench run` takes these for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import read_jsonl

from gramlite.cli import run

Row = dict[str, Any]


def pairs_file(path: Path, labels: Sequence[Any], column: str = "label") -> Path:
    """One pair a label; a label that is a dict is a row's columns."""
    rows: list[Row] = [
        {"prompt": f"q{n}", "response_a": f"x{n}", "response_b": f"y{n}"}
        | (label if isinstance(label, dict) else {column: label})
        for n, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench_labels(
    tmp_path: Path, model: Path, labels: Sequence[Any], column: str = "label", said: str = ""
) -> list[Any]:
    """What `bench run` takes for the labels of a file."""
    pairs, folder = pairs_file(tmp_path / "pairs.jsonl", labels, column), tmp_path / "run"
    command = ["bench", "run", f"pairs:{pairs}", "-m", str(model), "--mode", "direct", "-o", str(folder)]
    assert run([*command, *([f"--labels={said}"] if said else [])]) == 0
    return [row["label"] for row in read_jsonl(folder / "rows.jsonl")]
