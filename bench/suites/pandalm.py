"""PandaLM's test set (Wang et al., ICLR 2024): answers of small models, three human annotators a pair.

Rule: the label is the majority of the annotators (0 tie, 1, 2; the first vote where all three differ); accuracy,
and precision, recall and F1 averaged over the three classes, an undefined ratio counting as 0. An answer that
cannot be read is wrong; the reading that takes it for a tie has names that end in `_unreadable_as_tie`. PandaLM
shows one order, `one_order_accuracy` where both were judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.judging.pair import Pair, Winner

SOURCE = (
    "Get data/testset-v1.json from github.com/WeOpenML/PandaLM: a JSON list of objects with instruction, input, "
    "response1, response2, cmp_key and annotator1 to annotator3 (0 tie, 1, 2)."
)
FILES = ("testset-v1.json", "pandalm.jsonl")
LABELS: dict[str, Winner] = {"0": "tie", "1": "A", "2": "B"}
CLASSES: tuple[Winner, ...] = ("tie", "A", "B")


def load(path: Path) -> Iterator[Pair]:
    """The pairs; the prompt is the instruction with its input below, the subset the two compared models."""
    return records.read_pairs(path, _pairs)


def _pairs(record: records.Record, number: int, where: str) -> Iterator[Pair]:
    votes = [records.label(record, f"annotator{i}", LABELS, where, SOURCE) for i in (1, 2, 3)]
    instruction, extra = records.text(record, "instruction", where), str(record.get("input") or "")
    yield records.make_pair(
        identifier=f"pandalm:{record.get('idx', number - 1)}",
        prompt=f"{instruction}\n\n{extra}" if extra.strip() else instruction,
        response_a=records.text(record, "response1", where),
        response_b=records.text(record, "response2", where),
        label=Counter(votes).most_common(1)[0][0],
        meta={"subset": str(record.get("cmp_key", "all")), "annotators": [record[f"annotator{i}"] for i in (1, 2, 3)]},
    )


def class_ratios(said: Sequence[str | None], labels: Sequence[str | None], name: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of one class."""
    hits = sum(one == label == name for one, label in zip(said, labels, strict=True))
    precision = hits / said.count(name) if hits else 0.0
    recall = hits / labels.count(name) if hits else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def metrics(said: Sequence[str | None], labels: Sequence[str | None]) -> dict[str, float | None]:
    """Accuracy, and the classes' mean precision, recall and F1; what is said is None where it can't be read."""
    ratios = zip(*(class_ratios(said, labels, name) for name in CLASSES), strict=True)
    means = dict(zip(("precision", "recall", "f1"), map(scoring.mean, ratios), strict=True))
    right = scoring.mean(one == label for one, label in zip(said, labels, strict=True))
    return {"accuracy": right, **(means if labels else dict.fromkeys(means))}


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """`accuracy`, `precision`, `recall` and `f1`, and the other readings under names of their own."""
    matched = scoring.match(rows, pairs)
    said, labels = [item.verdict for item in matched.judged], [item.label for item in matched.judged]
    scores = metrics(said, labels)
    if None in said:
        as_tie = metrics([one or "tie" for one in said], labels)
        scores |= {f"{name}_unreadable_as_tie": value for name, value in as_tie.items()}
    if matched.both_orders:
        scores["one_order_accuracy"] = scoring.mean(item.orders["ab"] == item.label for item in matched.judged)
    scores["accuracy_without_ties"] = scoring.accuracy(matched.judged)
    for name, items in sorted(matched.by_subset().items()):
        scores[f"{name} accuracy"] = scoring.mean(item.correct for item in items)
    notes = scoring.official_size(pairs, {"pairs": 999}, part_of=lambda pair: "pairs")
    return scoring.result(matched, headline="accuracy", scores=scores, notes=notes)
