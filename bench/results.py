"""A sweep's results: one table as text, Markdown and CSV, reports, and a page that says in words what was measured."""

from __future__ import annotations

import csv
import io
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gramlite.storage import Inputs, atomic_output, check_note
from gramlite.terminal import note, say, say_json, visible

from .compare import Comparison
from .gate import Finding
from .statistics import Estimate, holm, pareto_front
from .swept import POOLED, Entry, Swept
from .tables import escaped, markdown_table, megabytes, p_value, percent, plain, points, rate, seconds_text

if TYPE_CHECKING:
    from .sweep import Plan

SIGNIFICANT = 0.05
MADE = "This page is written by the command"  # by which it is known again


def write_results(
    plan: Plan, swept: Swept, findings: Sequence[Finding], *, report: bool, page: Path | None, as_json: bool
) -> None:
    """Write the table beside the runs, the reports and the page where asked for, and print the table."""
    write_text(
        plan.folder / "results.md",
        "\n".join(["# Results", "", settings_sentence(plan), "", *tables_markdown(swept)]) + "\n",
    )
    write_text(plan.folder / "results.csv", csv_results(swept))
    if report:
        from .report import write_report

        for suite, comparisons in swept.comparisons.items():
            if suite != POOLED:
                base, *runs = swept.runs_of(suite).values()
                name = "report.html" if len(plan.works) == 1 else f"report-{suite}.html"
                written = write_report(plan.folder / name, base, runs, [comparisons[run.name] for run in runs])
                note(f"Report: {', '.join(map(str, written))}")
    if page:
        write_page(page, plan, swept)
        note(f"Page: {page}")
    if as_json or not sys.stdout.isatty():
        for row in json_rows(swept, findings):
            say_json(row)
    else:
        show(swept, findings)


def write_text(path: Path, text: str) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


# --- the table -----------------------------------------------------------------------------------------------


def table_rows(swept: Swept, suite: str) -> list[dict[str, str]]:
    """A row for each type, the base first, every figure as text; a type that failed has its reason."""
    comparisons, runs = swept.comparisons[suite], swept.runs_of(suite)
    rows = []
    for entry in swept.entries:
        row = {"type": entry.name, "size MB": megabytes(entry.size_bytes), "bits a weight": bits_text(entry)}
        if entry.name in comparisons:
            row |= compared_cells(comparisons[entry.name])
        elif entry is swept.base:
            row |= base_cells(comparisons)
        else:
            row |= dict.fromkeys(base_cells(comparisons), "–")
        seconds = runs[entry.name].seconds_per_pair if entry.name in runs else None
        row["s/pair"] = seconds_text(seconds)
        if any(other.failure for other in swept.entries):
            row["failed"] = entry.failure or ""
        rows.append(row)
    return rows


def base_cells(comparisons: Mapping[str, Comparison]) -> dict[str, str]:
    measure = next(iter(comparisons.values())).measures["accuracy"] if comparisons else None
    accuracy = rate(measure.base) if measure and measure.base else "–"
    return {"accuracy %": accuracy, "Δ accuracy": "base", "mean |Δ margin|": "", "flips %": "", "agreement %": ""}


def compared_cells(comparison: Comparison) -> dict[str, str]:
    measured = comparison.measures
    accuracy = measured["accuracy"]
    return {
        "accuracy %": rate(accuracy.run) if accuracy.run else "–",
        "Δ accuracy": points(accuracy.change),
        "mean |Δ margin|": nats(measured["margin"].change),
        "flips %": rate(measured["flips"].change),
        "agreement %": percent(measured["agreement"].change.value),
    }


def nats(estimate: Estimate) -> str:
    if not estimate.n:
        return "–"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def bits_text(entry: Entry) -> str:
    return "–" if entry.bits_per_weight is None else f"{entry.bits_per_weight:.2f}"


def title_of(swept: Swept, suite: str) -> str:
    """A suite with the number of its pairs, and of those on which accuracy is measured."""
    run = next(iter(swept.runs_of(suite).values()))
    labelled = sum(row.get("label") in ("A", "B") for row in run.rows.values())
    return f"{suite}, {len(run.rows):,} pairs, {labelled:,} of them labelled A or B"


def tables_markdown(swept: Swept) -> list[str]:
    """Every suite's table under a heading of its own."""
    lines: list[str] = []
    for suite in swept.comparisons:
        lines += [f"## {escaped(title_of(swept, suite))}", "", *markdown_table(table_rows(swept, suite)), ""]
    return lines


def json_rows(swept: Swept, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """An object for each suite and type, rates as fractions, and one for each of the gate's clauses."""
    rows: list[dict[str, Any]] = []
    for suite, comparisons in swept.comparisons.items():
        runs = swept.runs_of(suite)
        for entry in swept.entries:
            row: dict[str, Any] = {
                "suite": suite, "type": entry.name, "bytes": entry.size_bytes, "bits_per_weight": entry.bits_per_weight,
                "pairs": len(runs[entry.name].rows) if entry.name in runs else 0,
                "seconds_per_pair": runs[entry.name].seconds_per_pair if entry.name in runs else None,
                "failure": entry.failure, **measured_figures(swept, comparisons, entry),
            }  # fmt: skip
            rows.append(row)
    return [*rows, *({"gate": finding.to_json()} for finding in findings)]


def measured_figures(swept: Swept, comparisons: Mapping[str, Comparison], entry: Entry) -> dict[str, Any]:
    """Accuracy, its change, margin error, flips and agreement, each with its interval and n; None where unknown."""
    names = ("accuracy", "accuracy_change", "margin_error", "flips", "agreement")
    found: dict[str, Estimate | None] = dict.fromkeys(names)
    if entry.name in comparisons:
        measured = comparisons[entry.name].measures
        found |= {"accuracy": measured["accuracy"].run, "accuracy_change": measured["accuracy"].change}
        found |= {"margin_error": measured["margin"].change, "flips": measured["flips"].change}
        found |= {"agreement": measured["agreement"].change}
    elif entry is swept.base and comparisons:
        found["accuracy"] = next(iter(comparisons.values())).measures["accuracy"].base
    return {name: estimate.to_json() if estimate else None for name, estimate in found.items()}


def cell(value: object) -> object:
    return plain(value) if isinstance(value, str) else value


def csv_results(swept: Swept) -> str:
    """The table with nothing rounded, a line for each suite and type; rates as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("suite", "type", "bytes", "bits_per_weight", "pairs", "seconds_per_pair")
    estimates = ("accuracy", "accuracy_change", "margin_error", "flips", "agreement")
    bounds = [f"{name}{end}" for name in estimates for end in ("", "_low", "_high", "_n")]
    writer.writerow([*names, *bounds, "failure"])
    for row in json_rows(swept, []):
        figures = [(row[name] or {}).get(key) for name in estimates for key in ("value", "low", "high", "n")]
        writer.writerow([*(cell(row[name]) for name in names), *figures, cell(row["failure"])])
    return out.getvalue()


def show(swept: Swept, findings: Sequence[Finding]) -> None:
    """Print the tables and what they say for people."""
    from gramlite.console import show_table

    for suite in swept.comparisons:
        show_table(title_of(swept, suite), table_rows(swept, suite))
    say(*what_it_says(swept), *(finding.sentence for finding in findings))


# --- in words ------------------------------------------------------------------------------------------------


def what_it_says(swept: Swept) -> list[str]:
    """Sentences on the first table: margin error in order, flips, accuracy with what could be seen at all, the front."""
    suite, comparisons = next(iter(swept.comparisons.items()))
    failed = [f"{entry.name} could not be measured: {entry.failure}" for entry in swept.entries if entry.failure]
    if not comparisons:
        return failed
    return [
        margin_sentence(swept, comparisons),
        flips_sentence(comparisons),
        accuracy_sentence(swept, comparisons),
        *front_sentence(swept, comparisons),
        *failed,
    ]


def margin_sentence(swept: Swept, comparisons: Mapping[str, Comparison]) -> str:
    changes = {name: comparison.measures["margin"].change for name, comparison in comparisons.items()}
    order = sorted(changes, key=lambda name: changes[name].value)
    listed = " < ".join(f"{name} {changes[name].value:.3f}" for name in order)
    text = f"Mean |margin error| against {swept.base.name}, in nats, from best to worst: {listed}."
    close = [
        f"{first} and {second}"
        for first, second in zip(order, order[1:], strict=False)
        if changes[second].low <= changes[first].high
    ]
    return f"{text} Intervals of these neighbours overlap: {', '.join(close)}." if close else text


def flips_sentence(comparisons: Mapping[str, Comparison]) -> str:
    changes = {name: comparison.measures["flips"].change for name, comparison in comparisons.items()}
    least, most = (pick(changes, key=lambda name: changes[name].value) for pick in (min, max))
    table = comparisons[most].table
    span = f"{rate(changes[most])} % with {most}"
    if least != most:
        span = f"from {rate(changes[least])} % with {least} to {span}"
    return (
        f"Verdicts that changed: {span}. Of "
        f"{most}'s, {table['lost']} went from right to wrong and {table['gained']} from wrong to right: accuracy sees "
        "only the difference of these two."
    )


def accuracy_sentence(swept: Swept, comparisons: Mapping[str, Comparison]) -> str:
    adjusted = holm([comparison.p for comparison in comparisons.values()])
    found = [
        f"{name} ({points(comparison.measures['accuracy'].change)} points, p {p_value(p)})"
        for (name, comparison), p in zip(comparisons.items(), adjusted, strict=True)
        if p <= SIGNIFICANT
    ]
    seen = [comparison.detectable for comparison in comparisons.values() if comparison.detectable is not None]
    power = ""
    if seen:
        least, most = percent(min(seen)), percent(max(seen))
        span = least if least == most else f"{least} (where few verdicts change) to {most}"
        power = f" True differences of {span} points would be found four times in five."
    if found:
        return f"Accuracy differs significantly from {swept.base.name}'s, corrected for the number of types: {', '.join(found)}.{power}"
    return (
        f"No type's accuracy differs significantly from {swept.base.name}'s, corrected for the number of types; "
        f"that is no proof of equality.{power}"
    )


def front_sentence(swept: Swept, comparisons: Mapping[str, Comparison]) -> list[str]:
    """Which types no smaller one matches in margin error."""
    known = [entry for entry in swept.entries if entry.name in comparisons and entry.size_bytes]
    errors = {entry.name: comparisons[entry.name].measures["margin"].change.value for entry in known}
    known = [entry for entry in known if math.isfinite(errors[entry.name])]
    front = pareto_front([float(entry.size_bytes or 0) for entry in known], [-errors[entry.name] for entry in known])
    best = sorted((known[index] for index in front), key=lambda entry: entry.size_bytes or 0)
    if len(known) < 2:
        return []
    listed = ", ".join(
        f"{entry.name} ({megabytes(entry.size_bytes)} MB, {errors[entry.name]:.3f} nats)" for entry in best
    )
    return [f"No file of the same size or smaller keeps the margins better than these: {listed}."]


# --- the page ------------------------------------------------------------------------------------------------


def check_page(path: Path, inputs: Inputs) -> None:
    """Raise InputError unless a page and its picture may be written there, or are there already."""
    check_note(path, inputs, MADE)
    check_note(path.with_suffix(".svg"), inputs, "" if path.exists() else None)


def write_page(path: Path, plan: Plan, swept: Swept) -> None:
    """Write the results as a page in Markdown, with the trade-off picture beside it."""
    from .picture import panels_of, write_pictures

    suite = next(iter(swept.comparisons))
    base, *runs = swept.runs_of(suite).values()
    comparisons = [swept.comparisons[suite][run.name] for run in runs]
    panels = [panel for panel in panels_of(base, runs, comparisons) if panel.key.endswith("-size")]
    pictures = write_pictures([path.with_suffix(".svg")], panels)
    lines = [
        f"# What quantization cost {escaped(plan.source.checkpoint.name)}",
        "",
        f"Every type against {escaped(swept.base.name)}, pair by pair. {settings_sentence(plan)} Brackets hold 95 % intervals; "
        "Δ is type minus base in percentage points; margins are log-odds in nats. "
        f"{MADE} at its end; nothing in it is typed by hand.",
        "",
        "## What it says",
        "",
        *(f"- {escaped(said)}" for said in what_it_says(swept)),
        "",
        *(f"![{escaped(panels[0].describe())}]({quote(picture.name)})\n" for picture in pictures),
        *tables_markdown(swept),
        "## Made with",
        "",
        *made_with(plan, swept),
    ]
    write_text(path, "\n".join(lines) + "\n")


def settings_sentence(plan: Plan) -> str:
    """How the pairs are judged, and what the types that are calibrated are calibrated on."""
    mode = {"direct": "Direct mode, one forward pass a verdict", "think": "Think mode, a rationale before each verdict"}
    orders = "both orders of each pair" if plan.options.orders == "both" else "each pair as given only"
    said = f"{mode[plan.options.mode]}, {orders}."
    if plan.source.calibration is None or not any(variant.is_calibrated for variant in plan.variants):
        return said
    how = plan.source.calibration_mode
    return f"{said} Calibrated on {f'judging in {how} mode' if how else 'transcripts as they were recorded'}."


def made_with(plan: Plan, swept: Swept) -> list[str]:
    """The machine, the versions, the suites, the calibration and the command, as a list."""
    record = next(iter(swept.base.runs.values())).record
    lines = [
        f"- Machine: {escaped(', '.join(f'{key} {value}' for key, value in (record.get('hardware') or {}).items() if value))}.",
        f"- Versions: {escaped(', '.join(f'{key} {value}' for key, value in (record.get('versions') or {}).items()))}.",
        f"- Checkpoint: {escaped(plan.source.checkpoint.name)}, sha256 over its files {plan.source.checkpoint_sha256[:16]}….",
    ]
    for key, work in plan.works.items():
        about = work.to_json()
        chosen = f"the first {work.limit}" if work.limit else "drawn by a hash of their ids" if work.sample else "all"
        if work.longest:
            chosen += f", of those of at most {work.longest:,} characters"
        lines.append(
            f"- {escaped(key)}: {len(work.pairs):,} pairs ({chosen}) of a file with sha256 {str(about['sha256'])[:16]}…."
        )
    runs = swept.runs_of(next(iter(plan.works)))
    for variant in plan.variants:
        if variant.path and variant.name in runs:
            sha256 = str(runs[variant.name].model.get("sha256"))[:16]
            lines.append(f"- {escaped(variant.name)}: a model that was there already, sha256 {sha256}….")
    calibration = plan.source.record()["calibration"]
    if calibration and any(variant.is_calibrated for variant in plan.variants):
        lines.append(
            f"- Calibration: at most {calibration['tokens']:,} tokens of the judge's own transcripts of {escaped(calibration['name'])} "
            f"(sha256 {calibration['sha256'][:16]}…), seed {calibration['seed']}."
        )
    lines += ["- Seconds a pair are wall-clock times of this run; other work on the machine shows in them.", ""]
    return [*lines, "```", visible(shlex.join(["gramlite", *sys.argv[1:]])), "```"]
