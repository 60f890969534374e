"""Comparisons as tables and sentences: Markdown and CSV, the same figures that the HTML report shows."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence

from gramlite.terminal import visible

from .compare import Comparison
from .folder import Run
from .statistics import Estimate

SIGNIFICANT = 0.05
MARKDOWN = re.compile(r"[\\`*_|<>#]|\](?=[(\[:])")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"


def points(estimate: Estimate) -> str:
    """A change in percentage points with its interval."""
    if not estimate.n:
        return "–"
    low, high = (f"{100 * bound:+.1f}" for bound in (estimate.low, estimate.high))
    return f"{100 * estimate.value:+.1f} [{low}, {high}]"


def rate(estimate: Estimate) -> str:
    """A rate in percent with its interval."""
    if not estimate.n:
        return "–"
    return f"{percent(estimate.value)} [{percent(estimate.low)}, {percent(estimate.high)}]"


def number(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f}" if estimate.n else "–"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f}"


def seconds_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def summary_table(base: Run, comparisons: Sequence[Comparison], runs: Mapping[str, Run]) -> list[dict[str, str]]:
    """A row for the base and one for each run, columns in order; every figure as text."""
    if not comparisons:
        return []
    measured = comparisons[0].measures
    first = {
        "model": base.name, "size MB": megabytes(base.size_bytes), "s/pair": seconds_text(base.seconds_per_pair),
        "accuracy %": rate(measured["accuracy"].base or measured["accuracy"].change), "Δ accuracy": "base",
        "p": "", "flips %": "", "lost / gained": "", "mean |Δ margin|": "", "KL": "",
        "consistent %": side(measured["consistency"].base), "first %": side(measured["first_position"].base),
        "rationale": tokens(measured["rationale"].base), "forced %": side(measured["forced"].base),
        "no verdict": str(comparisons[0].counts["base_no_verdict"]), "detectable": "", "n": "",
    }  # fmt: skip
    return [first, *(_summary_row(comparison, runs[comparison.run]) for comparison in comparisons)]


def _summary_row(comparison: Comparison, run: Run) -> dict[str, str]:
    measured = comparison.measures
    return {
        "model": comparison.run,
        "size MB": megabytes(run.size_bytes),
        "s/pair": seconds_text(run.seconds_per_pair),
        "accuracy %": side(measured["accuracy"].run),
        "Δ accuracy": points(measured["accuracy"].change),
        "p": p_value(comparison.p) if comparison.counts["labelled"] else "–",
        "flips %": rate(measured["flips"].change),
        "lost / gained": f"{comparison.table['lost']} / {comparison.table['gained']}",
        "mean |Δ margin|": number(measured["margin"].change),
        "KL": number(measured["divergence"].change),
        "consistent %": side(measured["consistency"].run),
        "first %": side(measured["first_position"].run),
        "rationale": tokens(measured["rationale"].run),
        "forced %": side(measured["forced"].run),
        "no verdict": str(comparison.counts["run_no_verdict"]),
        "detectable": "–" if comparison.detectable is None else percent(comparison.detectable),
        "n": f"{comparison.counts['labelled']} / {comparison.counts['judged']}",
    }


def side(estimate: Estimate | None) -> str:
    return percent(estimate.value) if estimate and estimate.n else "–"


def tokens(estimate: Estimate | None) -> str:
    return f"{estimate.value:.0f}" if estimate and estimate.n else "–"


def subset_table(comparison: Comparison) -> list[dict[str, str]]:
    """A row for each subset."""
    return [
        {
            "subset": subset.name, "rows": str(subset.rows), "Δ accuracy": points(subset.accuracy),
            "flips %": rate(subset.flips), "p": p_value(subset.p), "p (Holm)": p_value(subset.p_holm),
        }
        for subset in comparison.subsets
    ]  # fmt: skip


def sentences(comparison: Comparison) -> list[str]:
    """What the figures say, without claiming more than the number of pairs allows."""
    accuracy, flips = comparison.measures["accuracy"], comparison.measures["flips"]
    said = []
    if flips.change.n:
        changed = round(flips.change.value * flips.change.n)
        said.append(
            f"{changed:,} of {flips.change.n:,} verdicts changed ({rate(flips.change)} %): "
            f"{comparison.table['lost']} from right to wrong, {comparison.table['gained']} from wrong to "
            f"right."
        )
    if not accuracy.change.n:
        return [*said, "No common row has a label of A or B, so nothing is said of accuracy."]
    said.append(
        f"Accuracy {side(accuracy.base)} % → {side(accuracy.run)} %, a change of {points(accuracy.change)} "
        f"points "
        f"(McNemar's exact p {p_value(comparison.p)}, n = {accuracy.change.n:,})."
    )
    said.append(_detectable_sentence(comparison))
    return said


def _detectable_sentence(comparison: Comparison) -> str:
    if comparison.detectable is None:
        return "There are too few labelled pairs to find any difference."
    found = f"a true difference of {percent(comparison.detectable)} points"
    if comparison.p <= SIGNIFICANT:
        return f"The difference is significant; this many pairs find {found} four times in five."
    return f"No significant difference, which is no proof of none: only {found} would be found four times in five."


def need_sentence(comparison: Comparison, need: float) -> str:
    """How many pairs would settle a difference of `need` points."""
    needed = comparison.pairs_needed(need / 100)
    have = comparison.counts["labelled"]
    if needed is None:
        return f"{comparison.run}: more than ten million pairs would be needed to find {need:g} points."
    enough = "which there are" if needed <= have else f"{needed - have:,} more than there are"
    return (
        f"{comparison.run}: to find a true difference of {need:g} points four times in five takes about "
        f"{needed:,} "
        f"labelled pairs, {enough}, if as many verdicts differ as here ({percent(comparison.discordance)} %)."
    )


def markdown(base: Run, comparisons: Sequence[Comparison], runs: Mapping[str, Run]) -> str:
    """The tables and sentences as one Markdown document."""
    lines = [f"# Compared with {escaped(base.name)}", "", *markdown_table(summary_table(base, comparisons, runs)), ""]
    for comparison in comparisons:
        lines += [f"## {escaped(comparison.run)}", ""]
        lines += [f"- {escaped(said)}" for said in (*sentences(comparison), *comparison.notes)]
        table = subset_table(comparison)
        lines += ["", *markdown_table(table), ""] if table else [""]
    lines.append("Δ is run minus base in percentage points; brackets hold 95 % intervals; detectable is the smallest ")
    lines[-1] += "true accuracy difference in points that McNemar's exact test finds with 80 % power."
    return "\n".join(lines) + "\n"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    if not rows:
        return []
    names = list(rows[0])
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
    return [
        "| " + " | ".join(cell if cell.startswith("---") else escaped(cell) for cell in line) + " |" for line in lines
    ]


def escaped(text: str) -> str:
    """Text as it is to be read in Markdown, on one line; the brackets of an interval need no escape, a link's do."""
    return MARKDOWN.sub(r"\\\g<0>", visible(" ".join(text.split())))


def csv_table(comparisons: Sequence[Comparison]) -> str:
    """Every figure, a line for each run, subset and measure; rates as fractions, nothing rounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [
        "base_run",
        "run",
        "subset",
        "measure",
        "unit",
        "base",
        "value",
        "change",
        "low",
        "high",
        "n",
        "p",
        "p_holm",
    ]
    writer.writerow(columns)
    for comparison in comparisons:
        for name, measure in comparison.measures.items():
            change, p = measure.change, comparison.p if name == "accuracy" else None
            sides = [estimate.value if estimate and estimate.n else None for estimate in (measure.base, measure.run)]
            figures = [change.value, change.low, change.high, change.n] if change.n else [None, None, None, 0]
            writer.writerow(
                [*map(plain, [comparison.base, comparison.run, "all", name]), measure.unit, *sides, *figures, p, None]
            )
        for subset in comparison.subsets:
            for name, estimate in (("accuracy", subset.accuracy), ("flips", subset.flips)):
                figures = (
                    [estimate.value, estimate.low, estimate.high, estimate.n] if estimate.n else [None, None, None, 0]
                )
                tested = [subset.p, subset.p_holm] if name == "accuracy" else [None, None]
                named = map(plain, [comparison.base, comparison.run, subset.name, name])
                writer.writerow([*named, "rate", None, None, *figures, *tested])
    return out.getvalue()


def plain(text: str) -> str:
    """A name that a spreadsheet will not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
