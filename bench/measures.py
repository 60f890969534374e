"""What is measured on two runs of the same pairs: each measure's value on both sides and its paired change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gramlite.rows import identifier_text

from . import statistics
from .folder import Row, is_number
from .statistics import Estimate

RowValue = Callable[[Row], float | None]
Gap = Callable[[float, float], float]


@dataclass(frozen=True)
class Measure:
    """One thing measured on both runs. `base` and `run` are None for what only exists between the two.

    `unit` is "rate" (a fraction), "nats", "tokens" or "seconds"; `better` is 1 where more is better, -1
    where less is, 0 where neither.
    """

    name: str
    title: str
    change: Estimate
    base: Estimate | None = None
    run: Estimate | None = None
    unit: str = "rate"
    better: int = 0

    def say(self, value: float) -> str:
        """A change in words: points for what both runs have, percent for other rates, else the unit."""
        if self.unit != "rate":
            return f"{value:+.3g} {self.unit}" if self.base else f"{value:.3f} {self.unit}"
        return f"{100 * value:+.1f} points" if self.base else f"{100 * value:.1f} %"

    def to_json(self) -> dict[str, Any]:
        sides = {side: value.to_json() for side, value in (("base", self.base), ("run", self.run)) if value}
        return {"change": self.change.to_json(), **sides, "unit": self.unit, "better": self.better}


@dataclass(frozen=True)
class Paired:
    """Rows that both runs judged, side by side, with what they share."""

    pairs: Sequence[tuple[Row, Row]]
    clusters: Sequence[Hashable] | None
    seed: int

    def select(self, keep: Callable[[Row, Row], bool]) -> Paired:
        kept = [i for i, (base, run) in enumerate(self.pairs) if keep(base, run)]
        clusters = [self.clusters[i] for i in kept] if self.clusters is not None else None
        return Paired([self.pairs[i] for i in kept], clusters, self.seed)

    def values(self, value: Callable[[Row, Row], float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([value(base, run) for base, run in self.pairs], dtype=np.float64)

    def rate(self, hit: Callable[[Row, Row], bool]) -> Estimate:
        return statistics.rate_interval(self.values(lambda a, b: float(hit(a, b))), clusters=self.clusters)

    def mean(self, value: Callable[[Row, Row], float], *, step: float | None = None) -> Estimate:
        return statistics.bootstrap_mean(self.values(value), clusters=self.clusters, step=step, seed=self.seed)

    def both(self, value: RowValue) -> Paired:
        """The rows of which both sides have the value."""
        return self.select(lambda base, run: value(base) is not None and value(run) is not None)

    def side_by_side(self, name: str, title: str, value: RowValue, *, unit: str, better: int) -> Measure:
        """A measure of each side and its paired change; rates of single rows lie between 0 and 1."""
        rows = self.both(value)
        step = 1.0 if unit == "rate" else None
        both = [(value(base) or 0.0, value(run) or 0.0) for base, run in rows.pairs]

        def estimate(values: Sequence[float], step: float | None) -> Estimate:
            if step is not None and set(values) <= {0.0, 1.0}:
                return statistics.rate_interval(values, clusters=rows.clusters)
            return statistics.bootstrap_mean(values, clusters=rows.clusters, seed=self.seed)

        change = statistics.bootstrap_mean(
            [run - base for base, run in both], clusters=rows.clusters, step=step, seed=self.seed
        )
        base, run = (estimate([pair[side] for pair in both], step) for side in (0, 1))
        return Measure(name, title, change, base, run, unit, better)


def clusters_of(matched: Sequence[tuple[Row, Row]]) -> list[Hashable] | None:
    """What rows share a prompt, None where each has its own."""
    found: list[Hashable] = []
    for base, run in matched:
        meta = {**(base.get("meta") or {}), **(run.get("meta") or {})}
        identifier = identifier_text(run.get("id"))
        found.append(meta.get("item") or meta.get("prompt_sha") or identifier)
    return found if len(set(found)) < len(found) else None


def label_of(base: Row, run: Row) -> object:
    return run.get("label") if run.get("label") is not None else base.get("label")


def subset_of(base: Row, run: Row) -> str:
    """The subset that the rows name, the run's own before the base's."""
    return str((run.get("meta") or {}).get("subset") or (base.get("meta") or {}).get("subset") or "all")


def is_right(row: Row, base: Row, run: Row) -> bool:
    return bool(row.get("verdict") == label_of(base, run))


def right_change(base: Row, run: Row) -> float:
    """+1 where only the run is right, -1 where only the base is."""
    return float(is_right(run, base, run)) - float(is_right(base, base, run))


def flipped(base: Row, run: Row) -> bool:
    return bool(base.get("verdict") != run.get("verdict"))


def measures_of(everything: Paired, judged: Paired, labelled: Paired) -> dict[str, Measure]:
    """Everything that is measured, by the name that a gate knows it by."""
    accuracy = Measure(
        "accuracy",
        "accuracy",
        labelled.mean(right_change, step=1.0),
        labelled.rate(lambda a, b: is_right(a, a, b)),
        labelled.rate(lambda a, b: is_right(b, a, b)),
        better=1,
    )
    found = [
        accuracy,
        Measure("flips", "verdicts changed", judged.rate(flipped), better=-1),
        Measure("lost", "right to wrong", labelled.rate(lambda a, b: right_change(a, b) < 0), better=-1),
        Measure("gained", "wrong to right", labelled.rate(lambda a, b: right_change(a, b) > 0), better=1),
        Measure("agreement", "same verdict", judged.rate(lambda a, b: not flipped(a, b)), better=1),
        between(judged, "margin", "mean |margin change|", "margin", margin_gap),
        between(judged, "divergence", "KL of the verdict", "p_a", statistics.verdict_divergence),
        judged.side_by_side("consistency", "orders agree", consistency, unit="rate", better=1),
        judged.side_by_side("first_position", "first response preferred", first_position, unit="rate", better=0),
        judged.side_by_side("rationale", "rationale tokens", rationale_tokens, unit="tokens", better=0),
        judged.side_by_side("forced", "thinking cut off", forced, unit="rate", better=-1),
        everything.side_by_side("no_verdict", "no verdict", no_verdict, unit="rate", better=-1),
        judged.side_by_side("seconds", "seconds a pair", seconds, unit="seconds", better=-1),
    ]
    return {measure.name: measure for measure in found}


def between(judged: Paired, name: str, title: str, key: str, gap: Gap) -> Measure:
    """A distance in nats between the orders that both rows have, averaged over a row's orders and then over rows."""
    found = judged.select(lambda base, run: bool(order_pairs(base, run, key)))
    return Measure(name, title, found.mean(lambda base, run: mean_gap(base, run, key, gap)), unit="nats", better=-1)


def order_pairs(base: Row, run: Row, key: str) -> list[tuple[float, float]]:
    """A number of both rows in each of the orders that both have."""
    left, right = by_order(base, key), by_order(run, key)
    return [(left[order], right[order]) for order in left if order in right]


def mean_gap(base: Row, run: Row, key: str, gap: Gap) -> float:
    """The distance between two rows, averaged over the orders that both have."""
    gaps = [gap(left, right) for left, right in order_pairs(base, run, key)]
    return sum(gaps) / len(gaps)


def gold_measures(judged: Paired, gold: Mapping[str, Row]) -> dict[str, Measure]:
    """How far each run lies from gold: nats of margin a pair, other verdicts of pairs, other sides of single orders."""

    def gold_of(row: Row) -> Row:
        return gold.get(identifier_text(row.get("id"))) or {}

    def margin(row: Row) -> float | None:
        known = order_pairs(gold_of(row), row, "margin")
        return mean_gap(gold_of(row), row, "margin", margin_gap) if known else None

    def other_verdict(row: Row) -> float | None:
        right = gold_of(row).get("verdict")
        return None if right is None else float(row["verdict"] != right)

    def other_sides(row: Row) -> float | None:
        known = order_pairs(gold_of(row), row, "margin")
        return sum((right > 0) != (said > 0) for right, said in known) / len(known) if known else None

    found = [
        judged.side_by_side("gold_margin", "mean |margin − gold|", margin, unit="nats", better=-1),
        judged.side_by_side("gold_flips", "verdicts other than gold's", other_verdict, unit="rate", better=-1),
        judged.side_by_side("gold_order_flips", "orders other than gold's", other_sides, unit="rate", better=-1),
    ]
    return {measure.name: measure for measure in found}


def gold_line(rows: Iterable[Row], gold: Mapping[str, Row]) -> dict[str, float | None]:
    """The factor by which margins are stretched against gold's, and the largest distance of one order, in nats."""
    known = [
        pair for row in rows for pair in order_pairs(gold.get(identifier_text(row.get("id"))) or {}, row, "margin")
    ]
    energy = sum(right * right for right, _ in known)
    return {
        "slope": sum(right * said for right, said in known) / energy if energy else None,
        "worst": max((abs(said - right) for right, said in known), default=None),
    }


def by_order(row: Row, key: str) -> dict[str, float]:
    """A number of each of a row's orders; a row settled without inference has its own for both."""
    orders = row.get("orders") or []
    if not orders and is_number(row.get(key)):
        return {"ab": float(row[key]), "ba": float(row[key])}
    return {str(order["order"]): float(order[key]) for order in orders if is_number(order.get(key))}


def margin_gap(base: float, run: float) -> float:
    return abs(run - base)


def consistency(row: Row) -> float | None:
    return None if row.get("consistent") is None else float(bool(row["consistent"]))


def first_position(row: Row) -> float | None:
    """Share of a row's orders that prefer the response shown first; None unless both orders decided."""
    said = {str(order["order"]): order.get("verdict") for order in row.get("orders") or []}
    if set(said) != {"ab", "ba"} or not set(said.values()) <= {"A", "B"}:
        return None
    return 0.5 * float(said["ab"] == "A") + 0.5 * float(said["ba"] == "B")


def rationale_tokens(row: Row) -> float | None:
    """Tokens generated an order, None without a rationale."""
    written = [order for order in row.get("orders") or [] if order.get("rationale")]
    counts = [(order.get("tokens") or {}).get("generated") for order in written]
    known: list[float] = [float(count) for count in counts if count is not None and is_number(count)]
    return sum(known) / len(known) if known else None


def forced(row: Row) -> float | None:
    """Whether the thinking of any order was ended by force, None without thinking."""
    orders = row.get("orders") or []
    if not any(order.get("rationale") or order.get("forced") for order in orders):
        return None
    return float(any(order.get("forced") for order in orders))


def no_verdict(row: Row) -> float:
    return float(row.get("verdict") is None)


def seconds(row: Row) -> float | None:
    return float(row["seconds"]) if is_number(row.get("seconds")) else None


_NO_ROWS = Paired([], None, seed=0)
MEASURES = tuple(measures_of(_NO_ROWS, _NO_ROWS, _NO_ROWS))
GOLD_MEASURES = tuple(gold_measures(_NO_ROWS, {}))
