"""What a sweep found as figures: a table for each suite, and the same for programs as JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gramlite.storage import atomic_output

from .comparison import RunComparison
from .gate import GateFinding
from .statistics import Estimate
from .summary import table_of
from .sweep_result import SweepEntry, SweepResult
from .table import Column, Table, escaped

SHOWN = {  # what a row of the table for people shows of a row of figures
    "type": "type", "bytes": "size", "bits_per_weight": "bits", "accuracy": "accuracy", "accuracy_change": "change",
    "margin_error": "margin", "flips": "flips", "agreement": "agreement", "seconds_per_pair": "seconds",
    "failure": "failed",
}  # fmt: skip
ESTIMATES = ("accuracy", "accuracy_change", "margin_error", "flips", "agreement")


def figures_of(swept: SweepResult, suite: str) -> list[dict[str, Any]]:
    """What is known of each type on a suite, the base first: rates are fractions, and None is what is not known."""
    comparisons, runs = swept.comparisons[suite], swept.runs_of(suite)
    rows = []
    for entry in swept.entries:
        run = runs.get(entry.name)
        rows.append({
            "suite": suite, "type": entry.name, "bytes": entry.size_bytes, "bits_per_weight": entry.bits_per_weight,
            "pairs": len(run.rows) if run else 0, "seconds_per_pair": run.seconds_per_pair if run else None,
            "failure": entry.failure, **estimates_of(swept, comparisons, entry),
        })  # fmt: skip
    return rows


def estimates_of(
    swept: SweepResult, comparisons: Mapping[str, RunComparison], entry: SweepEntry
) -> dict[str, Estimate | None]:
    """Accuracy, its change, margin error, flips and agreement, each with its interval and n; None where unknown."""
    found: list[Estimate | None] = [None] * len(ESTIMATES)
    if entry.name in comparisons:
        measured = comparisons[entry.name].measures
        changes = [measured[name].change for name in ("accuracy", "margin", "flips", "agreement")]
        found = [measured["accuracy"].run, *changes]
    elif entry is swept.base and comparisons:
        found[0] = next(iter(comparisons.values())).measures["accuracy"].base
    return dict(zip(ESTIMATES, found, strict=True))


def suite_table(swept: SweepResult, suite: str) -> Table:
    """A row for each type, the base first; a type that failed has its reason."""
    rows = [{SHOWN[name]: row[name] for name in SHOWN} for row in figures_of(swept, suite)]
    rows[0] |= {"change": "base"} | dict.fromkeys(["margin", "flips", "agreement"], "")
    failed = [row["failed"] for row in rows]
    for row in rows:
        row["failed"] = row["failed"] or ""
    return table_of(title_of(swept, suite), [name for name in SHOWN.values() if name != "failed" or any(failed)], rows)


def title_of(swept: SweepResult, suite: str) -> str:
    """A suite with the number of its pairs, and of those on which accuracy is measured."""
    run = next(iter(swept.runs_of(suite).values()))
    labelled = sum(row.get("label") in ("A", "B") for row in run.rows.values())
    return f"{suite}, {len(run.rows):,} pairs, {labelled:,} of them labelled A or B"


def tables_markdown(swept: SweepResult) -> list[str]:
    """Every suite's table under a heading of its own."""
    tables = [suite_table(swept, suite) for suite in swept.comparisons]
    return [line for table in tables for line in (f"## {escaped(table.title)}", "", *table.markdown(), "")]


def json_rows(swept: SweepResult, findings: Sequence[GateFinding]) -> list[dict[str, Any]]:
    """An object for each suite and type, and one for each of the gate's clauses."""
    rows = [
        {name: value.to_json() if isinstance(value, Estimate) else value for name, value in row.items()}
        for suite in swept.comparisons
        for row in figures_of(swept, suite)
    ]
    return [*rows, *({"gate": finding.to_json()} for finding in findings)]


def csv_results(swept: SweepResult) -> str:
    """The table with nothing rounded, a line for each suite and type."""
    names = ["suite", "type", "bytes", "bits_per_weight", "pairs", "seconds_per_pair", *ESTIMATES, "failure"]
    rows = [[row[name] for name in names] for suite in swept.comparisons for row in figures_of(swept, suite)]
    return Table("Results", [Column(name, interval=name in ESTIMATES) for name in names], rows).csv()


def write_text(path: Path, text: str) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
