"""Verdicts that changed, as the data of the report's flip browser.

The texts are hostile: they are embedded so that no character can end the block that holds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gramlite.errors import InputError
from gramlite.judging.pair import Pair
from gramlite.rows import identifier_text
from gramlite.storage import sha256_cached
from gramlite.terminal import visible

from .folder import Row, Run, is_number
from .measures import label_of, right_change, subset_of


def embedded(value: object) -> str:
    """JSON for a script element: no `<`, `>` or `&` is left in it, so that nothing can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)


def pair_texts(runs: Sequence[Run]) -> dict[str, Pair]:
    """The judged pairs, read again from the suite's file where it still is what the run read; empty otherwise."""
    from .suites import load_pairs, open_suite

    for run in runs:
        suite = run.suite
        try:
            name, module, path = open_suite(f"{suite['name']}:{suite['path']}")
            if path.is_dir() or sha256_cached(path) == suite.get("sha256"):
                return {
                    identifier_text(pair.id): pair
                    for pair in load_pairs(name, module, path, labels=suite.get("labels"))
                }
        except (InputError, KeyError, OSError):
            continue
    return {}


def direction_of(base: Row, run: Row) -> str:
    """What a changed verdict did: lost a right one, gained one, or neither."""
    if label_of(base, run) not in ("A", "B"):
        return "other"
    change = right_change(base, run)
    return "lost" if change < 0 else "gained" if change > 0 else "other"


def flip_data(
    base: Run, runs: Sequence[Run], pairs: Mapping[str, Pair], *, text_limit: int, flip_limit: int
) -> dict[str, Any]:
    """What the flip browser shows: each run's changed verdicts, largest margin change first."""
    shown: dict[str, Any] = {}
    judged: dict[str, Any] = {}
    listed = []
    for run in runs:
        flips = [
            (i, row, base.rows[i]) for i, row in run.rows.items() if i in base.rows and _changed(base.rows[i], row)
        ]
        flips.sort(key=lambda flip: (-_margin_change(flip[2], flip[1]), flip[0]))
        for identifier, row, first in flips[:flip_limit]:
            judged.setdefault(identifier, judgement(first, text_limit))
            shown.setdefault(identifier, _pair_data(pairs.get(identifier), first, row, text_limit))
        entries = [
            {"id": i, "direction": direction_of(first, row), "run": judgement(row, text_limit)}
            for i, row, first in flips[:flip_limit]
        ]
        listed.append({"name": visible(run.name), "flips": entries, "all": len(flips)})
    return {"base": visible(base.name), "runs": listed, "pairs": shown, "judged": judged}


def _changed(base: Row, run: Row) -> bool:
    said = base.get("verdict"), run.get("verdict")
    return None not in said and said[0] != said[1]


def _margin_change(base: Row, run: Row) -> float:
    first, second = base.get("margin"), run.get("margin")
    return abs(second - first) if is_number(first) and is_number(second) else 0.0


def _pair_data(pair: Pair | None, base: Row, run: Row, limit: int) -> dict[str, Any]:
    known = {"label": label_of(base, run), "subset": visible(subset_of(base, run))}
    if pair is None:
        return known
    texts = {"prompt": pair.prompt, "a": pair.response_a, "b": pair.response_b}
    return known | {key: shortened(text, limit) for key, text in texts.items()}


def judgement(row: Row, limit: int) -> dict[str, Any]:
    """A row as the flip browser shows it."""
    return {
        "verdict": row.get("verdict"),
        "p_a": _number(row.get("p_a")),
        "consistent": row.get("consistent"),
        "reason": row.get("reason"),
        "orders": [
            {
                "order": order.get("order"),
                "verdict": order.get("verdict"),
                "p_a": _number(order.get("p_a")),
                "forced": bool(order.get("forced")),
                "rationale": shortened(order.get("rationale"), limit),
            }
            for order in row.get("orders") or []
        ],
    }


def _number(value: object) -> float | None:
    return round(value, 4) if is_number(value) else None


def shortened(text: object, limit: int) -> str | None:
    """A text of at most about `limit` characters, which says how much is left out."""
    if not isinstance(text, str):
        return None
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"
