"""RewardBench (Lambert et al., 2024), the first version: chosen against rejected in four sections.

Official rule (`scripts/run_generative.py`, `calculate_scores_per_section`): a verdict for the chosen
response is 1, for the rejected one 0, anything else (a tie, an answer that cannot be read) 0.5; a subset's
score is the mean, a section's the mean of its subsets weighted by the official counts, which give math-prm
the weight of the code subsets. The overall score is the mean of the four sections. The official script shows
one random order; where both were judged the verdict is that of both, and `one_order_overall` the official
reading of the order that shows response_a first, which is the chosen one by a hash of the id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.errors import InputError
from gramlite.judging.pair import Pair
from gramlite.rows import conversation

SOURCE = (
    "Get the split `filtered` of the Hub's allenai/reward-bench and save it as JSON lines "
    "(datasets.load_dataset(...)['filtered'].to_json('rewardbench.jsonl')): objects with prompt, chosen, rejected, "
    "subset and id."
)
FILES = ("rewardbench.jsonl", "filtered.jsonl")
SECTIONS: dict[str, dict[str, int]] = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "chat_hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "reasoning": {
        "math-prm": 984,  # 447 pairs, weighted like the six code subsets together
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
OFFICIAL = {name: count for weights in SECTIONS.values() for name, count in weights.items()} | {"math-prm": 447}


def load(path: Path) -> Iterator[Pair]:
    """The pairs; which side shows the chosen response is decided by a hash of the id."""
    return records.read_pairs(path, partial(_pairs, Counter()))


def _pairs(seen: Counter[str], record: records.Record, number: int, where: str) -> Iterator[Pair]:
    if not {"prompt", "chosen", "rejected", "subset"} <= record.keys():
        raise InputError(f"{where}: no RewardBench record. {SOURCE}")
    subset = records.text(record, "subset", where)
    identifier = f"rewardbench:{subset}:{record.get('id', number)}"
    seen[identifier] += 1
    yield records.chosen_pair(
        identifier=identifier if seen[identifier] == 1 else f"{identifier}#{seen[identifier]}",
        prompt=_content(record["prompt"], where),
        chosen=_content(record["chosen"], where),
        rejected=_content(record["rejected"], where),
        meta={"subset": subset},
    )


def _content(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        return conversation(value)
    raise InputError(f"{where}: prompt, chosen and rejected must be text or messages. {SOURCE}")


def points(said: str | None, label: str | None) -> float:
    """1 for the chosen response, 0 for the rejected one, 0.5 for anything else."""
    return float(said == label) if said in ("A", "B") else 0.5


def sections_of(subsets: Mapping[str, float | None]) -> dict[str, float | None]:
    """Each section over the subsets present, and the overall score where every subset is."""
    scores: dict[str, float | None] = {}
    for section, weights in SECTIONS.items():
        present = {name: weight for name, weight in weights.items() if subsets.get(name) is not None}
        total = sum((subsets[name] or 0.0) * weight for name, weight in present.items())
        scores[section] = total / sum(present.values()) if present else None
    whole = OFFICIAL.keys() <= subsets.keys()
    return scores | {"overall": scoring.mean_of_all(scores.values()) if whole else None}


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Each subset, each section over the subsets present, and the overall score where every subset is."""
    matched = scoring.match(rows, pairs)
    groups = matched.by_subset()
    subsets = {name: scoring.mean(points(i.verdict, i.label) for i in items) for name, items in groups.items()}
    scores = sections_of(subsets)
    if matched.both_orders:
        first = {name: scoring.mean(points(i.orders["ab"], i.label) for i in items) for name, items in groups.items()}
        scores["one_order_overall"] = sections_of(first)["overall"]
    notes = scoring.official_size(pairs, OFFICIAL)
    if matched.missing:
        scores |= dict.fromkeys(scores.keys() & {"overall", "one_order_overall"})
    if scores["overall"] is None:
        absent = [name for name in OFFICIAL if name not in subsets]
        why = f"without {', '.join(absent)}" if absent else f"{matched.missing} pairs were not judged"
        notes.append(f"No overall score: {why}.")
    scores |= {f"subset_{name}": value for name, value in subsets.items()}
    scores["accuracy"] = scoring.accuracy(matched.judged)
    headline = "overall" if scores["overall"] is not None else "accuracy"
    return scoring.result(matched, headline=headline, scores=scores, notes=notes)
