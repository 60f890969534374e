"""PandaLM's test set (Wang et al., ICLR 2024): answers of small models, three human annotators a pair.

Official rule (`data/compute_metrics.py`): the label is the majority of the annotators (0 tie, 1, 2; the
first vote where all three differ), an answer that cannot be read counts as a tie; accuracy, and precision,
recall and F1 averaged over the three classes, an undefined ratio counting as 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.pair import Pair, Winner

SOURCE = (
    "Get data/testset-v1.json from github.com/WeOpenML/PandaLM: a JSON list of objects with instruction, "
    "input, "
    "response1, response2, cmp_key and annotator1 to annotator3 (0 tie, 1, 2)."
)
FILES = ("testset-v1.json", "pandalm.jsonl")
LABELS: dict[str, Winner] = {"0": "tie", "1": "A", "2": "B"}
CLASSES: tuple[Winner, ...] = ("tie", "A", "B")


def load(path: Path, *, limit: int | None = None) -> Iterator[Pair]:
    """The pairs; the prompt is the instruction with its input below, the subset the two compared models."""
    return islice(_pairs(path), limit)


def _pairs(path: Path) -> Iterator[Pair]:
    for number, record in records.read_records(path):
        where = f"{path.name}, record {number}"
        if records.is_plain(record):
            yield records.plain_pair(record, where)
            continue
        votes = [records.label(record, f"annotator{i}", LABELS, where, SOURCE) for i in (1, 2, 3)]
        instruction, extra = records.text(record, "instruction", where), str(record.get("input") or "")
        yield records.make_pair(
            identifier=f"pandalm:{record.get('idx', number - 1)}",
            prompt=f"{instruction}\n\n{extra}" if extra.strip() else instruction,
            response_a=records.text(record, "response1", where),
            response_b=records.text(record, "response2", where),
            label=Counter(votes).most_common(1)[0][0],
            meta={
                "subset": str(record.get("cmp_key", "all")),
                "annotators": [record[f"annotator{i}"] for i in (1, 2, 3)],
            },
        )


def class_ratios(items: Sequence[scoring.Judged], name: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of one class."""
    said = [item for item in items if (item.verdict or "tie") == name]
    true = [item for item in items if item.label == name]
    hits = sum(item.label == name for item in said)
    precision = hits / len(said) if said else 0.0
    recall = hits / len(true) if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """`accuracy`, `precision`, `recall` and `f1` as PandaLM's script, and the accuracy without ties."""
    matched = scoring.match(rows, pairs)
    scores: dict[str, float | None] = {
        "accuracy": scoring.mean((item.verdict or "tie") == item.label for item in matched.judged)
    }
    ratios = [class_ratios(matched.judged, name) for name in CLASSES]
    for position, name in enumerate(("precision", "recall", "f1")):
        scores[name] = sum(ratio[position] for ratio in ratios) / 3 if matched.judged else None
    scores["accuracy_without_ties"] = scoring.accuracy(matched.judged)
    for name, items in sorted(matched.by_subset().items()):
        scores[f"{name} accuracy"] = scoring.mean((item.verdict or "tie") == item.label for item in items)
    return scoring.result(matched, headline="accuracy", scores=scores, notes=scoring.single_order_note(matched))
