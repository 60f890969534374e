"""`gramlite bench compare`: runs against a base run, printed, gated and reported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gramlite.errors import InputError
from gramlite.storage import check_note
from gramlite.terminal import note, say, say_json

from .comparison import RunComparison, compare_runs
from .folder import Run, distinct_names, files_of, read_run
from .gate import GATE, Gate, gate_options
from .report import check_report, report_files, write_report
from .summary import need_sentence, sentences, subset_table, summary_table


def show(base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison]) -> None:
    """Print the comparisons for people."""
    summary_table(base, runs, comparisons).show()
    for comparison in comparisons:
        say(*(f"{comparison.run}: {said}" for said in (*sentences(comparison), *comparison.notes)))
        if comparison.subsets:
            subset_table(comparison).show()


@click.command()
@click.argument("base_run", type=click.Path(path_type=Path), metavar="BASE_RUN")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--gold",
    type=click.Path(path_type=Path),
    metavar="GOLD",
    help="Say, too, how far each run lies from gold margins: a run folder, or JSON lines with id and margin.",
)
@gate_options
@click.option("--need", type=float, metavar="F", help="Say how many pairs would find a difference of F points.")
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="OUT.html", help="Write the report (and its tables)."
)
@click.option("--independent", is_flag=True, help="Take rows that share a prompt as independent.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal.")
def command(
    base_run: Path,
    runs: tuple[Path, ...],
    gold: Path | None,
    gate: Gate,
    need: float | None,
    report: Path | None,
    independent: bool,
    seed: int,
    as_json: bool,
) -> int:
    """Compare runs with a base run: accuracy, flips, margins, intervals, and what the pairs can show at all.

    BASE_RUN and RUN are folders of `gramlite bench run`, or files of judged rows or of gold margins.
    """
    if need is not None and not 0 < need <= 100:
        raise InputError("--need is a difference in percentage points, more than 0 and at most 100.")
    base, *others = distinct_names([read_run(path) for path in (base_run, *runs)])
    right = read_run(gold) if gold else None
    inputs = [file for run in (base, *others, *([right] if right else [])) for file in files_of(run)]
    if report:
        check_report(report, inputs)
    if gate.junit:
        check_note(gate.junit, [*inputs, *(report_files(report) if report else [])], GATE)
    comparisons = [compare_runs(base, other, seed=seed, cluster=not independent, gold=right) for other in others]
    findings = [finding for comparison in comparisons for finding in gate.evaluate(comparison)]
    if as_json or not sys.stdout.isatty():
        for comparison in comparisons:
            own = [finding.to_json() for finding in findings if finding.run == comparison.run]
            extra: dict[str, Any] = {"gate": own} if gate.clauses else {}
            extra |= {"pairs_needed": {f"{need:g}": comparison.pairs_needed(need / 100)}} if need is not None else {}
            say_json({**comparison.to_json(), **extra})
    else:
        show(base, others, comparisons)
        say(*(need_sentence(comparison, need) for comparison in comparisons if need is not None))
        say(*(finding.sentence for finding in findings))
    if report:
        written = write_report(report, base, others, comparisons)
        note(f"Report: {', '.join(map(str, written))}")
    gate.tell(findings)
    return 0
