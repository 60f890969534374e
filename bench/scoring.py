"""What official scores are computed from: judged rows, each matched with its labelled pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gramlite.pair import Pair

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """A labelled pair that has a row. `verdict` is the row's; None is a row without a verdict.

    `orders` holds the un-swapped verdict of each order that was judged ("ab", "ba"), None where it has none.
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
        return str(self.meta.get("subset", "all"))

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
    """Rows matched with pairs: `judged` in the order of the pairs, `missing` counts pairs without any row."""

    judged: Sequence[Judged]
    missing: int
    both_orders: bool = field(default=True)

    def where(self, keep: Callable[[Judged], bool]) -> list[Judged]:
        return [item for item in self.judged if keep(item)]

    def of_subset(self, name: str) -> list[Judged]:
        return self.where(lambda item: item.subset == name)

    def by_subset(self) -> dict[str, list[Judged]]:
        groups: dict[str, list[Judged]] = {}
        for item in self.judged:
            groups.setdefault(item.subset, []).append(item)
        return groups


def match(rows: Iterable[Row], pairs: Sequence[Pair]) -> Match:
    """Find each pair's row by id; of several rows with one id the last counts.

    `both_orders` is false as soon as the rows hold one order only.
    """
    known = {row.get("id"): row for row in rows}
    judged = [
        _judged(pair, known[pair.id]) for pair in pairs if pair.id in known
    ]  # rows of pairs that are not asked about are nobody's concern here
    single = any(len(item.orders) == 1 for item in judged)
    return Match(judged, len(pairs) - len(judged), not single)


def _judged(pair: Pair, row: Row) -> Judged:
    orders = {str(order["order"]): order.get("verdict") for order in row.get("orders") or []}
    if not orders:  # settled without inference, or failed: every order says what the row says
        orders = {"ab": row.get("verdict"), "ba": row.get("verdict")}
    return Judged(pair, row.get("verdict"), orders)


def mean(values: Iterable[float | bool]) -> float | None:
    """The mean, None of nothing."""
    listed = [float(value) for value in values]
    return sum(listed) / len(listed) if listed else None


def mean_of_all(values: Iterable[float | None]) -> float | None:
    """The mean, None of nothing and where any value is missing: a macro average is complete or it is none."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) / len(known) if known and len(known) == len(listed) else None


def result(
    matched: Match,
    *,
    headline: str,
    scores: Mapping[str, float | None],
    notes: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """A suite's score: `scores` by name as fractions, the `headline` among them, and their counts."""
    return {
        "headline": headline,
        "scores": dict(scores),
        "n": len(matched.judged),
        "no_verdict": sum(item.verdict is None for item in matched.judged),
        "missing": matched.missing,
        "notes": list(notes),
        **more,
    }


def accuracy(items: Iterable[Judged]) -> float | None:
    """Share of rows whose verdict is the label, over the rows labelled A or B; no verdict is not correct."""
    return mean(item.correct for item in items if item.label in ("A", "B"))


def single_order_note(matched: Match) -> list[str]:
    return [] if matched.both_orders else ["Only one order was judged: position bias is part of this score."]
