"""JudgeBench (Tan et al., ICLR 2025): pairs of model answers of which one is objectively correct.

Official rule (`utils/metrics.py`, the default of its script): each pair is judged in both orders; +1 for a
decision that is the label, -1 for its opposite, 0 for a tie or none; a pair counts when the sum is positive,
over all pairs: right in one order and tied in the other is enough. Papers print other readings too, which
have names of their own here: `group_mean` is the mean of the four groups, `both_orders_right` the stricter
share, `gram_macro` (GRAM) the mean of the groups with the verdict of both orders' mean probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.judging.pair import Pair, Winner

SOURCE = (
    "Get data/dataset=judgebench,response_model=….jsonl from github.com/ScalerLab/JudgeBench: JSON lines with "
    "pair_id, source, question, response_A, response_B and a label of A>B or B>A."
)
FILES = (
    "dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl",
    "dataset=judgebench,response_model=claude-3-5-sonnet-20240620.jsonl",
    "judgebench_gpt.jsonl",
    "judgebench_claude.jsonl",
)
LABELS: dict[str, Winner] = {'"A>B"': "A", '"B>A"': "B"}
PREFIXES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
GROUPS = tuple(PREFIXES.values())
OFFICIAL = [dict(zip(GROUPS, sizes, strict=True)) for sizes in ((154, 98, 56, 42), (154, 51, 34, 31))]  # GPT-4o, Claude


def load(path: Path) -> Iterator[Pair]:
    """The pairs of an official file or of gramlite's own schema; the subset is the official source."""
    return records.read_pairs(path, _pairs)


def _pairs(record: records.Record, number: int, where: str) -> Iterator[Pair]:
    yield records.make_pair(
        identifier=records.text(record, "pair_id", where),
        prompt=records.text(record, "question", where),
        response_a=records.text(record, "response_A", where),
        response_b=records.text(record, "response_B", where),
        label=records.label(record, "label", LABELS, where, SOURCE),
        meta={"subset": records.text(record, "source", where)},
    )


def group_of(source: str) -> str:
    """The paper's group of an official source, by the source's prefix."""
    return next((group for prefix, group in PREFIXES.items() if source.startswith(prefix)), "other")


def net(item: scoring.Judged) -> int:
    """+1 for each order that says the label, -1 for each that says the opposite."""
    opposite = {"A": "B", "B": "A"}.get(item.label or "")
    return sum((said == item.label) - (said == opposite) for said in item.orders.values() if said)


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """`official` over all pairs and by group, and the other readings under names of their own."""
    matched = scoring.match(rows, pairs)
    groups: dict[str, list[scoring.Judged]] = {name: [] for name in GROUPS}
    for item in matched.judged:
        groups.setdefault(group_of(item.subset), []).append(item)
    scores: dict[str, float | None] = {"official": scoring.mean(net(item) > 0 for item in matched.judged)}
    for name, items in groups.items():
        scores[f"official_{name}"] = scoring.mean(net(item) > 0 for item in items)
    scores["group_mean"] = scoring.mean_of_all(scores[f"official_{name}"] for name in GROUPS)
    if matched.both_orders:
        scores["both_orders_right"] = scoring.both_right(matched.judged)
    by_group = {name: scoring.mean(item.correct for item in groups[name]) for name in GROUPS}
    scores["gram_macro"] = scoring.mean_of_all(by_group.values())
    scores |= {f"gram_{name}": value for name, value in by_group.items()}
    notes = scoring.official_size(pairs, *OFFICIAL, part_of=lambda pair: group_of(scoring.subset_of(pair)))
    one = "JudgeBench's script judges both orders; this is its --single_game."
    return scoring.result(matched, headline="official", scores=scores, notes=notes, one_order=one)
