"""What comparisons say: their figures as tables, for people and for programs, and in sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .comparison import RunComparison
from .folder import Run
from .measures import GOLD_MEASURES, Measure
from .statistics import Estimate
from .table import (
    NONE,
    Column,
    Table,
    Value,
    escaped,
    megabytes,
    p_value,
    percent,
    points,
    rate,
    three_digits,
    two_digits,
    whole,
    with_interval,
)

SIGNIFICANT = 0.05
COLUMNS = {
    "model": Column("model"),
    "type": Column("type"),
    "subset": Column("subset"),
    "rows": Column("rows", whole),
    "size": Column("size MB", megabytes),
    "bits": Column("bits a weight", two_digits),
    "seconds": Column("s/pair", two_digits),
    "accuracy": Column("accuracy %", percent, interval=True),
    "change": Column("Δ accuracy", points, interval=True),
    "p": Column("p", p_value),
    "p_holm": Column("p (Holm)", p_value),
    "flips": Column("flips %", percent, interval=True),
    "agreement": Column("agreement %", percent),
    "lost": Column("right → wrong", whole),
    "gained": Column("wrong → right", whole),
    "margin": Column("mean |Δ margin|", three_digits, interval=True),
    "divergence": Column("KL", three_digits),
    "gold_margin": Column("mean |margin − gold|", three_digits, interval=True),
    "gold_flips": Column("not as gold %", percent, interval=True),
    "consistency": Column("consistent %", percent),
    "first_position": Column("first shown %", percent),
    "rationale": Column("rationale tokens", whole),
    "forced": Column("cut off %", percent),
    "no_verdict": Column("no verdict", whole),
    "detectable": Column("detectable", percent),
    "labelled": Column("labelled", whole),
    "judged": Column("judged", whole),
    "failed": Column("failed"),
}
SUMMARY = (
    "model size seconds accuracy change p flips lost gained margin divergence gold_margin gold_flips consistency "
    "first_position rationale forced no_verdict detectable labelled judged"
).split()
FIGURES = ("base_run", "run", "subset", "measure", "unit", "base", "value", "change", "low", "high", "n", "p", "p_holm")


def table_of(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Value]]) -> Table:
    """A table of the columns of these names; what a row has not is empty."""
    return Table(title, [COLUMNS[name] for name in names], [[row.get(name, "") for name in names] for row in rows])


def figures(run: Run, comparison: RunComparison, *, is_base: bool = False) -> dict[str, Value]:
    """What there is to say of a run, or of the base, by column."""
    measured, counts, side = comparison.measures, comparison.counts, "base" if is_base else "run"
    found: dict[str, Value] = {"model": run.name, "size": run.size_bytes, "seconds": run.seconds_per_pair}
    found |= {name: getattr(measure, side) for name, measure in measured.items() if measure.run and name != "seconds"}
    found["no_verdict"] = counts[f"{side}_no_verdict"]
    if is_base:
        return found | {"change": "base"}
    found |= {name: measured[name].change for name in ("flips", "agreement", "margin", "divergence")}
    found |= {"change": measured["accuracy"].change, "p": comparison.p if counts["labelled"] else None}
    found |= {name: comparison.table[name] for name in ("lost", "gained")}
    return found | {name: counts[name] for name in ("labelled", "judged")} | {"detectable": comparison.detectable}


def summary_table(base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison]) -> Table:
    """The base and each run, a row each."""
    rows = [figures(run, comparison) for run, comparison in zip(runs, comparisons, strict=True)]
    rows = [figures(base, comparisons[0], is_base=True), *rows] if comparisons else []
    names = [name for name in SUMMARY if not name.startswith("gold") or (comparisons and comparisons[0].gold)]
    return table_of(f"Compared with {base.name}", names, rows)


def subset_table(comparison: RunComparison) -> Table:
    """A row for each subset."""
    rows = [{**vars(subset), "subset": subset.name, "change": subset.accuracy} for subset in comparison.subsets]
    return table_of(f"{comparison.run} by subset", "subset rows change flips p p_holm".split(), rows)


def figures_table(comparisons: Sequence[RunComparison]) -> Table:
    """Every figure, a row for each run, subset and measure; rates as fractions."""
    rows: list[list[Value]] = []
    for comparison in comparisons:
        names = [comparison.base, comparison.run]
        for name, measure in comparison.measures.items():
            p = comparison.p if name == "accuracy" else None
            sides = [_value(measure.base), _value(measure.run)]
            rows.append([*names, "all", name, measure.unit, *sides, *_bounds(measure.change), p, None])
        for subset in comparison.subsets:
            tested = [subset.p, subset.p_holm]
            names = [comparison.base, comparison.run, subset.name]
            rows.append([*names, "accuracy", "rate", None, None, *_bounds(subset.accuracy), *tested])
            rows.append([*names, "flips", "rate", None, None, *_bounds(subset.flips), None, None])
    return Table("Figures", [Column(name) for name in FIGURES], rows)


def _value(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate and estimate.n else None


def _bounds(estimate: Estimate) -> list[float | None]:
    known = [estimate.value, estimate.low, estimate.high] if estimate.n else [None, None, None]
    return [*known, estimate.n]


def sentences(comparison: RunComparison) -> list[str]:
    """What the figures say, without claiming more than the number of pairs allows."""
    accuracy, flips = comparison.measures["accuracy"], comparison.measures["flips"].change
    said = []
    if flips.n:
        said.append(
            f"{round(flips.value * flips.n):,} of {flips.n:,} verdicts changed ({rate(flips)} %): "
            f"{comparison.table['lost']} from right to wrong, {comparison.table['gained']} from wrong to right."
        )
    if accuracy.change.n:
        said.append(
            f"Accuracy {_sides(accuracy, percent, ' %')}, a change of {with_interval(accuracy.change, points)} points "
            f"(McNemar's exact p {p_value(comparison.p)}, n = {accuracy.change.n:,})."
        )
        said.append(_detectable_sentence(comparison))
    else:
        said.append("No common row has a label of A or B, so nothing is said of accuracy.")
    return [*said, *_gold_sentences(comparison)]


def _sides(measure: Measure, form: Callable[[float], str], unit: str) -> str:
    """A measure of the base and of the run."""
    return " → ".join(f"{form(side.value)}{unit}" if side and side.n else NONE for side in (measure.base, measure.run))


def _detectable_sentence(comparison: RunComparison) -> str:
    if comparison.detectable is None:
        return "There are too few labelled pairs to find any difference."
    found = f"a true difference of {percent(comparison.detectable)} points"
    if comparison.p <= SIGNIFICANT:
        return f"The difference is significant; this many pairs find {found} four times in five."
    return f"No significant difference, which is no proof of none: only {found} would be found four times in five."


def _gold_sentences(comparison: RunComparison) -> list[str]:
    """How far both sides lie from gold, where it was given."""
    if not comparison.gold:
        return []
    margin, flips, orders = (comparison.measures[name] for name in GOLD_MEASURES)
    base, run = comparison.gold["base"], comparison.gold["run"]
    return [
        f"From {comparison.gold['name']}: mean |margin − gold| {_sides(margin, three_digits, ' nats')}, a change of "
        f"{with_interval(margin.change, '{:+.3f}'.format)} (n = {margin.change.n:,}); other verdicts "
        f"{_sides(flips, percent, ' %')}, other sides of single orders {_sides(orders, percent, ' %')}.",
        f"At worst an order's margin is off by {base['worst']:.2f} → {run['worst']:.2f} nats; gold's margins are stretched "
        f"{base['slope']:.2f} → {run['slope']:.2f} times.",
    ]


def need_sentence(comparison: RunComparison, need: float) -> str:
    """How many pairs would settle a difference of `need` points."""
    needed = comparison.pairs_needed(need / 100)
    have = comparison.counts["labelled"]
    if needed is None:
        return f"{comparison.run}: more than ten million pairs would be needed to find {need:g} points."
    enough = "which there are" if needed <= have else f"{needed - have:,} more than there are"
    return (
        f"{comparison.run}: to find a true difference of {need:g} points four times in five takes about {needed:,} "
        f"labelled pairs, {enough}, if as many verdicts differ as here ({percent(comparison.discordance)} %)."
    )


def markdown(base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison]) -> str:
    """The tables and sentences as one Markdown document."""
    lines = [f"# Compared with {escaped(base.name)}", "", *summary_table(base, runs, comparisons).markdown(), ""]
    for comparison in comparisons:
        lines += [f"## {escaped(comparison.run)}", ""]
        lines += [f"- {escaped(said)}" for said in (*sentences(comparison), *comparison.notes)]
        lines += ["", *subset_table(comparison).markdown(), ""] if comparison.subsets else [""]
    lines.append(
        "Δ is run minus base in percentage points; brackets hold 95 % intervals; detectable is the smallest "
        "true accuracy difference in points that McNemar's exact test finds with 80 % power."
    )
    return "\n".join(lines) + "\n"
