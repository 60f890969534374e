"""What official scores are computed from: judged rows, each matched with its labelled pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gramlite.judging.pair import Pair
from gramlite.rows import identifier_text

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """A labelled pair that has a row. `verdict` is the row's; None is a row without a verdict.

    `orders` holds the un-swapped verdict of each order that the run judged ("ab", "ba"), None where it has none.
    """

    pair: Pair
    verdict: str | None
    orders: Mapping[str, str | None]

    @property
    def label(self) -> str | None:
        return self.pair.label

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.pair.meta or {}

    @property
    def subset(self) -> str:
        return subset_of(self.pair)

    @property
    def correct(self) -> bool:
        """Whether the row's verdict is the label."""
        return self.verdict is not None and self.verdict == self.label

    @property
    def agreed(self) -> str | None:
        """The verdict on which every judged order agrees, else None."""
        found = set(self.orders.values())
        return next(iter(found)) if len(found) == 1 else None


@dataclass(frozen=True)
class Match:
    """Rows matched with pairs: `judged` in the order of the pairs, `missing` counts pairs without any row.

    `both_orders` says whether the run judged both, `partial` counts its rows that hold one of them only, `unlabelled`
    the pairs that were left out because they have no label.
    """

    judged: Sequence[Judged]
    missing: int
    both_orders: bool
    partial: int
    unlabelled: int

    def where(self, keep: Callable[[Judged], bool]) -> list[Judged]:
        return [item for item in self.judged if keep(item)]

    def of_subset(self, name: str) -> list[Judged]:
        return self.where(lambda item: item.subset == name)

    def by_subset(self) -> dict[str, list[Judged]]:
        groups: dict[str, list[Judged]] = {}
        for item in self.judged:
            groups.setdefault(item.subset, []).append(item)
        return groups


def match(rows: Iterable[Row], pairs: Sequence[Pair], *, unlabelled: bool = False) -> Match:
    """Find each pair's row by id; of several rows with one id the last counts.

    Every row has a verdict for the same orders, those that any of them holds: where one is missing it is None, and a
    row without orders (settled without the model, or failed) says in each what it says as a whole. Pairs without a
    label are left out, unless `unlabelled` ones are wanted.
    """
    known = {identifier_text(row.get("id")): row for row in rows}
    wanted = [pair for pair in pairs if unlabelled or pair.label is not None]
    found = [(pair, known[key]) for pair in wanted if (key := identifier_text(pair.id)) in known]
    said = [{str(order["order"]): order.get("verdict") for order in row.get("orders") or []} for _, row in found]
    asked = sorted({order for orders in said for order in orders}) or ["ab", "ba"]
    judged = [
        Judged(
            pair, row.get("verdict"), {order: orders.get(order) if orders else row.get("verdict") for order in asked}
        )
        for (pair, row), orders in zip(found, said, strict=True)
    ]
    return Match(
        judged,
        missing=len(wanted) - len(judged),
        both_orders=len(asked) > 1,
        partial=sum(0 < len(orders) < len(asked) for orders in said),
        unlabelled=len(pairs) - len(wanted),
    )


def mean(values: Iterable[float | bool]) -> float | None:
    """The mean, None of nothing."""
    listed = [float(value) for value in values]
    return sum(listed) / len(listed) if listed else None


def mean_of_all(values: Iterable[float | None]) -> float | None:
    """The mean, None of nothing and where any value is missing: a macro average is complete or it is none."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None


def subset_of(pair: Pair) -> str:
    return str((pair.meta or {}).get("subset", "all"))


def official_size(
    pairs: Sequence[Pair], *official: Mapping[str, int], part_of: Callable[[Pair], str] = subset_of
) -> list[str]:
    """A note where the pairs aren't as many of each part as one of the suite's official sets has."""
    counts = Counter(map(part_of, pairs))
    if counts in official:
        return []
    nearest = max(official, key=lambda sizes: sum(counts[part] for part in sizes))
    sizes = ", ".join(f"{counts[part]} of {size} {part}" for part, size in nearest.items() if counts[part] != size)
    return [f"Not the whole official set of pairs: {sizes or 'it has others'}."]


def result(
    matched: Match,
    *,
    headline: str,
    scores: Mapping[str, float | None],
    notes: Sequence[str] = (),
    one_order: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A suite's score: `scores` by name as fractions, the `headline` among them, and their counts.

    `one_order` says what one order alone is under the suite's rule, for the note where no more was judged.
    """
    known = []
    if not matched.both_orders:
        known.append(f"Only one order was judged: position bias is part of this score. {one_order}".strip())
    if matched.partial:
        known.append(f"{matched.partial} rows hold one order only; the other counts as no verdict.")
    if matched.unlabelled:
        known.append(f"{matched.unlabelled} pairs have no label and don't count.")
    return {
        "headline": headline,
        "scores": dict(scores),
        "n": len(matched.judged),
        "no_verdict": sum(item.verdict is None for item in matched.judged),
        "missing": matched.missing,
        "notes": [*known, *notes],
        **more,
    }


def accuracy(items: Iterable[Judged]) -> float | None:
    """Share of rows whose verdict is the label, over the rows labelled A or B; no verdict is not correct."""
    return mean(item.correct for item in items if item.label in ("A", "B"))


def both_right(items: Iterable[Judged]) -> float | None:
    """Share of rows on which every judged order says the label."""
    return mean(item.agreed is not None and item.agreed == item.label for item in items)
