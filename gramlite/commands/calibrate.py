"""`gramlite calibrate`: labelled pairs in; a calibrated confidence, and with `--budget auto` a think budget, stored."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import InputError
from gramlite.options import JudgeOptions, judge_options, labels_option, output_options
from gramlite.rows.judged_run import JudgedRun, RowsOutput
from gramlite.terminal import note, say, say_json

if TYPE_CHECKING:
    from gramlite.judging.budget import BudgetTable
    from gramlite.judging.confidence import Calibration, Labelled
    from gramlite.judging.judge import Judge
    from gramlite.judging.pair import Pair, Verdict, Winner
    from gramlite.rows import Row


def labelled_rows(source: str, *, ties: bool, meanings: Mapping[str, Winner | None] | None) -> list[Row[Pair]]:
    """The rows of a file that hold a pair with a label; how many are left out is said on standard error."""
    from gramlite.rows import open_rows, pair_from_json, read_labelled

    lines, _ = open_rows(source, pair_from_json)
    with lines:
        rows = read_labelled(lines, meanings)
    wanted = [row for row in rows if row.value and row.value.label]
    if len(wanted) < len(rows):
        note(f"{len(rows) - len(wanted)} of {len(rows)} rows are left out: no readable pair, or no label.")
    return [row for row in wanted if ties or (row.value and row.value.label != "tie")]


def warn_of_labels(data: Labelled) -> None:
    """Say so where the judge agrees with fewer labels than a coin would."""
    from gramlite.judging.confidence import below_chance

    if found := below_chance(data):
        right, count, p = found
        note(
            f"Warning: the judge is right on {right} of {count} pairs, fewer than a coin would be (exact binomial test, "
            f"p = {p:.2g}). Most likely the labels are the other way round: say what they mean, as in --labels 1=B,2=A."
        )


def check_labels(rows: Sequence[Row[Pair]], *, one_order: bool) -> None:
    """Refuse labels that make no calibration before anything is judged; raises InputError."""
    import numpy as np

    from gramlite.judging.confidence import OUTCOMES, require_both_sides, require_enough

    pairs = [row.value for row in rows if row.value and row.value.response_a != row.value.response_b]
    require_enough(len(pairs))
    if one_order:
        require_both_sides(np.array([OUTCOMES[pair.label] for pair in pairs if pair.label]))


def judged(judge: Judge, rows: Sequence[Row[Pair]], output: RowsOutput) -> Labelled:
    """Judge the rows, each on disk before the next, in the output where there is one."""
    from gramlite.judging.confidence import labelled
    from gramlite.rows.display import Display
    from gramlite.rows.journal import read_journal

    answers = {row.digest: (row.value.label, row.value.prompt) for row in rows if row.value}
    with tempfile.TemporaryDirectory() as folder:
        path = output.path or Path(folder) / "rows.jsonl"
        with (
            Display(as_json=True, quiet=True, total=len(rows)) as display,
            JudgedRun(judge, replace(output, path=path), display) as run,
        ):
            run.judge_pairs(rows)
        found = [row for row, _ in read_journal(path) if row]
    return labelled((row, *answers[row["input"]]) for row in found if row.get("input") in answers)


def measured(judge: Judge, rows: Sequence[Row[Pair]]) -> tuple[BudgetTable, list[Verdict]]:
    """The table of budgets and the verdicts at the chosen one."""
    from gramlite.console import progress
    from gramlite.judging.budget import measure

    pairs = [row.value for row in rows if row.value]
    with progress() as bar:
        task = bar.add_task("Judging", total=None)
        return measure(judge, pairs, on_verdict=lambda: bar.advance(task))


def fit(options: JudgeOptions, rows: Sequence[Row[Pair]], output: RowsOutput) -> None:
    """Measure, store and say what was found."""
    from gramlite.formats.sidecar import require_writable
    from gramlite.judging.budget import store as store_budget
    from gramlite.judging.confidence import calibrate, labelled
    from gramlite.judging.confidence import store as store_calibration

    check_labels(rows, one_order=options.orders == "ab")
    artifact = options.artifact_path()
    automatic = options.budget == "auto"
    options = replace(options, budget=1024) if automatic else options
    with options.open() as judge:
        require_writable(artifact)
        table = None
        if automatic:
            table, verdicts = measured(judge, rows)
            store_budget(artifact, table)
            judge = judge.with_settings(budget=table.chosen)
            answers = [(row.value.label, row.value.prompt) for row in rows if row.value]
            data = labelled((verdict, *answer) for verdict, answer in zip(verdicts, answers, strict=True))
        else:
            data = judged(judge, rows, output)
        calibration = calibrate(data, judge.model, judge.settings_record)
        warn_of_labels(data)
        path = store_calibration(artifact, calibration)
    show(calibration, table, path, as_json=output.as_json or not sys.stdout.isatty())


def show(calibration: Calibration, table: BudgetTable | None, path: Path, *, as_json: bool) -> None:
    """What was measured, on standard output."""
    if as_json:
        say_json({"calibration": asdict(calibration), "budgets": table and asdict(table), "stored": str(path)})
        return
    report = calibration.report
    if table:
        _show_budgets(table)
    say(
        f"temperature {calibration.temperature:.3f}, position bias {calibration.bias:+.3f} nats",
        f"expected calibration error  before {_interval(report, 'error_before')}",
        f"  on held-out folds         after  {_interval(report, 'error_after')}",
        f"                            fall   {_interval(report, 'fall')}",
        f"accuracy {report['accuracy_before']:.3f} before, {report['accuracy_after']:.3f} after",
        f"{report['pairs']} pairs, {report['ties']} of them ties; intervals of 95 %. Stored in {path}.",
    )


def _interval(report: Mapping[str, Any], name: str) -> str:
    value, low, high = report[name]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _show_budgets(table: BudgetTable) -> None:
    say("budget  accuracy  95 % interval   behind the best  cut short  tokens")
    for row in table.rows:
        mark = "  chosen" if row.budget == table.chosen else ""
        say(
            f"{row.budget:>6}  {row.accuracy:8.3f}  [{row.low:.3f}, {row.high:.3f}]  {row.behind:6.3f} ± {row.noise:.3f}"
            f"  {row.cut:8.0%}  {row.tokens:6.0f}{mark}"
        )


@click.command(context_settings={"show_default": False})
@click.argument("pairs", metavar="PAIRS.jsonl")
@judge_options
@click.option(
    "--ties",
    type=click.Choice(["half", "drop"]),
    default="half",
    show_default=True,
    help="A pair labelled a tie counts as half a win for each side, or is left out.",
)
@labels_option
@output_options("ROWS.jsonl", "Keep the judged rows.")
def command(
    options: JudgeOptions, pairs: str, ties: str, labels: Mapping[str, Winner | None] | None, output: RowsOutput
) -> None:
    """Fit a judge's confidence to labelled pairs, for --calibrated.

    Stored beside the model for these settings. With --budget auto, the smallest think budget that is as accurate as
    the best is found first and stored for --budget auto.
    """
    from gramlite.formats.sidecar import sidecar_path
    from gramlite.storage import check_file

    if options.calibrated:
        raise InputError("calibrate measures the judge as it is. Drop --calibrated.")
    if output.path and options.budget == "auto":
        raise InputError("-o keeps the rows of one judging, and --budget auto takes several. Drop one of them.")
    output.prepare([pairs, *options.inputs()])
    if options.model:
        check_file(sidecar_path(Path(options.model)), [pairs])
    fit(options, labelled_rows(pairs, ties=ties == "half", meanings=labels), output)
