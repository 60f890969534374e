"""A sweep's results, written where they were asked for, and printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gramlite.errors import InputError
from gramlite.storage import check_file, check_note
from gramlite.terminal import note, say, say_json

from .gate import GATE, GateFinding
from .plan import LOCK, RECORD, SweepPlan
from .report import write_report
from .sweep_page import check_page, settings_sentence, write_page
from .sweep_result import POOLED, SweepResult
from .sweep_table import csv_results, json_rows, suite_table, tables_markdown, write_text
from .sweep_words import what_it_says


def check_outputs(plan: SweepPlan, page: Path | None, junit: Path | None) -> None:
    """Raise InputError for a folder, a page or a file of outcomes that is not a sweep's, before any work is done."""
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder. Choose another -o.")
    check_file(folder / RECORD)
    if folder.is_dir() and not (folder / RECORD).exists() and any(each.name != LOCK for each in folder.iterdir()):
        raise InputError(f"{folder} holds other things than a sweep. Choose another -o, a new folder or an empty one.")
    inputs = [plan.source.calibration, plan.options.template, *(variant.path for variant in plan.variants)]
    inputs += [work.path for work in plan.works.values() if work.path.is_file()]
    if page:
        check_page(page, inputs)
    if junit:
        check_note(junit, [*inputs, page], GATE)


def write_results(
    plan: SweepPlan,
    swept: SweepResult,
    findings: Sequence[GateFinding],
    *,
    report: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Write the table beside the runs, the reports and the page where asked for, and print the table."""
    lines = ["# Results", "", settings_sentence(plan), "", *tables_markdown(swept)]
    write_text(plan.folder / "results.md", "\n".join(lines) + "\n")
    write_text(plan.folder / "results.csv", csv_results(swept))
    for suite, comparisons in swept.comparisons.items() if report else ():
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
        for suite in swept.comparisons:
            suite_table(swept, suite).show()
        say(*what_it_says(swept), *(finding.sentence for finding in findings))
