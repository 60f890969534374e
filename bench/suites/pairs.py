"""Your own labelled pairs: `pairs:FILE`, JSON lines in any shape that `gramlite judge` reads.

Accuracy is the share of correct verdicts over the pairs labelled A or B, no verdict and a tie not being
correct; agreement also counts the pairs labelled a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.errors import InputError
from gramlite.judging.pair import Pair, Winner
from gramlite.rows import SHAPES, Labels, identifier_text, pair_from_json, puts_better_first

SOURCE = f"Give a file of JSON lines as pairs:FILE. Accepted shapes: {SHAPES}; a label is A, B or tie."
FILES = ("pairs.jsonl",)


def load(path: Path, *, labels: Mapping[str, Winner | None] | None = None) -> Iterator[Pair]:
    """The pairs, labelled or not; the subset is the row's `subset`, or that of its meta.

    `labels` says what labels mean that don't say it themselves (see `gramlite.rows.Labels`).
    """
    seen: set[str] = set()
    rows = list(records.read_records(path))
    known = Labels((record for _, record in rows), labels)
    for number, record in rows:
        try:
            pair = pair_from_json(record, default_id=str(number), read_label=known.read)
        except InputError as error:
            raise InputError(f"{path.name}, line {number}: {error}") from None
        if identifier_text(pair.id) in seen:
            raise InputError(f"{path.name}, line {number}: the id {pair.id!r} is there twice. Make ids unique.")
        seen.add(identifier_text(pair.id))
        meta = {k: v for k, v in (pair.meta or {}).items() if k not in records.PLANTED}
        subset = record.get("subset") or meta.get("subset") or "all"
        meta = {"prompt_sha": records.digest(pair.prompt), **meta, "subset": str(subset)}
        if puts_better_first(record):
            pair = _sided(pair)
        yield replace(pair, meta=meta)


def _sided(pair: Pair) -> Pair:
    """Move the chosen response to the side that a hash of the id says."""
    if records.chosen_side(identifier_text(pair.id)) == "A":
        return pair
    return replace(pair, response_a=pair.response_b, response_b=pair.response_a, label="B")


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracy, agreement with ties, consistency, the share of first-shown responses; accuracy by subset."""
    matched = scoring.match(rows, pairs, unlabelled=True)
    labelled = matched.where(lambda item: item.label is not None)
    first = [
        said == ("A" if order == "ab" else "B")
        for item in matched.judged
        for order, said in item.orders.items()
        if said in ("A", "B")
    ]
    scores: dict[str, float | None] = {
        "accuracy": scoring.accuracy(matched.judged),
        "agreement_with_ties": scoring.mean(item.correct for item in labelled),
        "first_position": scoring.mean(first),
    }
    if matched.both_orders:
        scores["consistency"] = scoring.mean(item.agreed is not None for item in matched.judged)
    for name, items in sorted(matched.by_subset().items()):
        if name != "all":
            scores[f"{name} accuracy"] = scoring.accuracy(items)
    unlabelled = len(matched.judged) - len(labelled)
    notes = [f"{unlabelled} pairs have no label and count only for consistency and flips."] if unlabelled else []
    return scoring.result(matched, headline="accuracy", scores=scores, notes=notes)
