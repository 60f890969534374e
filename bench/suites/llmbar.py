"""LLMBar (Zeng et al., ICLR 2024): instructions with one output that follows them and one that does not.

Official rule (`LLMEvaluator/evaluate.py`): each instance is judged in both orders; a subset's accuracy is
the mean of the two orders' accuracies, anything but the label being wrong; its positional agreement the share
of instances on which the orders say the same, be it nothing. The adversarial average is the mean of its four
subsets, the average the mean of all five; `both_orders_right` is the script's correct_both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.errors import InputError
from gramlite.judging.pair import Pair, Winner

SOURCE = (
    "Get the folder Dataset/LLMBar (or Dataset/Processed) from github.com/princeton-nlp/LLMBar: a dataset.json in "
    "each subset's folder, a list of objects with input, output_1, output_2 and a label of 1 or 2."
)
FILES = ("LLMBar", "Processed", "llmbar.jsonl", "llmbar_processed.jsonl", records.WHOLE_FOLDER)
LABELS: dict[str, Winner] = {"1": "A", "2": "B", '"1"': "A", '"2"': "B"}
ADVERSARIAL = tuple(f"Adversarial/{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual"))
OFFICIAL = dict(zip(("Natural", *ADVERSARIAL), (100, 134, 92, 47, 46), strict=True))
PROCESSED = {"FairEval": 66, "LLMEval^2": 200, "MT-Bench": 200}


def load(path: Path) -> Iterator[Pair]:
    """The pairs of one dataset.json or of every one under a folder; the subset is the folder's name."""
    if path.is_file():
        yield from file_pairs(path, path.parent.name)
        return
    files = sorted(path.rglob("dataset.json"))
    if not files:
        raise InputError(f"The folder {path} holds no dataset.json. {SOURCE}")
    for file in files:
        yield from file_pairs(file, file.parent.relative_to(path).as_posix())


def file_pairs(path: Path, subset: str) -> Iterator[Pair]:
    """The pairs of one file in LLMBar's format or in gramlite's own schema."""
    return records.read_pairs(path, partial(_pairs, subset))


def _pairs(subset: str, record: records.Record, number: int, where: str) -> Iterator[Pair]:
    yield records.make_pair(
        identifier=f"llmbar:{subset}:{number - 1:04d}",
        prompt=records.text(record, "input", where),
        response_a=records.text(record, "output_1", where),
        response_b=records.text(record, "output_2", where),
        label=records.label(record, "label", LABELS, where, SOURCE),
        meta={"subset": subset},
    )


def both_orders_accuracy(items: Sequence[scoring.Judged]) -> float | None:
    """The mean of the orders' accuracies; an order without a verdict is not correct."""
    return scoring.mean(said == item.label for item in items for said in item.orders.values())


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Accuracy and positional agreement of each subset, and the averages where every subset is there."""
    matched = scoring.match(rows, pairs)
    subsets = matched.by_subset()
    scores: dict[str, float | None] = {}
    for prefix, items in [("", matched.judged), *((f"{name} ", items) for name, items in sorted(subsets.items()))]:
        scores[f"{prefix}accuracy"] = both_orders_accuracy(items)
        if matched.both_orders:
            scores[f"{prefix}agreement"] = scoring.mean(len(set(item.orders.values())) == 1 for item in items)
            scores[f"{prefix}both_orders_right"] = scoring.both_right(items)
    adversarial = [scores.get(f"{name} accuracy") for name in ADVERSARIAL]
    headline = "accuracy"
    if any(name.startswith("Adversarial") or name == "Natural" for name in subsets):
        scores["adversarial_average"] = scoring.mean_of_all(adversarial)
        scores["average"] = scoring.mean_of_all([scores.get("Natural accuracy"), *adversarial])
        headline = "average" if scores["average"] is not None else "accuracy"
    notes = scoring.official_size(pairs, OFFICIAL, PROCESSED)
    one = "LLMBar's accuracy is the mean of both."
    return scoring.result(matched, headline=headline, scores=scores, notes=notes, one_order=one)
