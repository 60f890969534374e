"""`gramlite bench run`: judge a suite into a run folder that survives a kill and is gone on with.

The rows lie in a journal (see `gramlite.rows.journal`): each is on disk before the next is begun. Besides what
`gramlite judge` writes, a row has the pair's `label`, its `meta` with the subset, and `seconds`: the
wall-clock time since the row before it, whose mean over the rows is the time a pair takes, however many are
decoded together.
"""

from __future__ import annotations

import datetime
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT
from gramlite.judging.pair import Pair, Verdict
from gramlite.options import JudgeOptions, judge_options, labels_option
from gramlite.rows.judged_run import JudgedRun, RowsOutput, Watcher, judge_record, say_rows_on_interrupt
from gramlite.storage import write_json
from gramlite.terminal import say, say_json, visible

from .environment import hardware, versions
from .folder import RECORD, ROWS, RUN_VERSION, check_run_folder, read_run
from .suites import LabelMeanings, suite_names
from .work import SuiteWork, load_work, pair_digest

if TYPE_CHECKING:
    from gramlite.judging.judge import Judge

PACKAGES = (
    "gramlite", "numpy", "llama-cpp-python", "onnxruntime-genai", "onnxruntime", "torch", "transformers", "tokenizers",
    "bitsandbytes", "gptqmodel",
)  # fmt: skip

HELP = (
    "Judge a benchmark into a run folder and score it officially.\n\n"
    f"The suites are {', '.join(suite_names())}; your own pairs are pairs:FILE. SUITE/SUBSET keeps one subset, or all "
    "whose names begin with it (rmbench/safety). Without a file, the suite's own is looked for in the folder "
    "GRAMLITE_BENCHMARKS."
)


def run_suite(
    judge: Judge, work: SuiteWork, folder: Path, *, display: Watcher, resume: bool = False, force: bool = False,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge what is not judged yet and return the finished run.json.

    `about` is added to run.json (what the model's file is, how it was run). Raises IntegrityError when the
    folder was made with another model, other settings or another suite, and InputError when it is there and
    neither `resume` nor `force` is given.
    """
    suite = {key: work.to_json()[key] for key in ("name", "sha256", "labels")}
    output = RowsOutput(path=folder / ROWS, resume=resume, force=force)
    started = now()
    check_run_folder(folder, resume=resume, force=force)
    with JudgedRun(judge, output, display, judge_record(judge) | {"suite": suite}) as run:
        kept = sum(run.kept.values())
        about = {"name": folder.name, **describe_run(judge, work), **(about or {}), "started": started}
        write_json(folder / RECORD, {**about, "finished": None})
        began = time.perf_counter()
        for row, verdict in judged_rows(judge, work.pairs, run.kept):
            run.add(row, verdict)
        seconds = time.perf_counter() - began
    return finish(folder, work, {**about, "finished": now(), "seconds": round(seconds, 3), "kept": kept})


def judged_rows(
    judge: Judge, pairs: Iterable[Pair], kept: Mapping[str, int]
) -> Iterator[tuple[dict[str, Any], Verdict]]:
    """The rows of the pairs that are not kept, in order."""
    todo = [pair for pair in pairs if not kept.get(pair_digest(pair))]
    last = time.perf_counter()
    for pair, verdict in zip(todo, judge.many(todo), strict=True):
        current = time.perf_counter()
        row = {**verdict.to_json(), "label": pair.label, "meta": dict(pair.meta or {}), "input": pair_digest(pair)}
        yield {**row, "seconds": round(current - last, 4)}, verdict
        last = time.perf_counter()


def finish(folder: Path, work: SuiteWork, record: Mapping[str, Any]) -> dict[str, Any]:
    """Score the rows and write the finished run.json."""
    rows = [row for row in read_run(folder).rows.values() if row.get("input")]
    wanted = {pair_digest(pair) for pair in work.pairs}
    rows = [row for row in rows if row["input"] in wanted]
    complete = {
        **record,
        "rows": len(rows),
        "no_verdict": sum(row["verdict"] is None for row in rows),
        "seconds_per_pair": sum(row["seconds"] for row in rows) / len(rows) if rows else None,
        "score": {"suite": work.name, **work.module.score(rows, work.pairs)},
    }
    write_json(folder / RECORD, complete)
    return complete


def describe_run(judge: Judge, work: SuiteWork) -> dict[str, Any]:
    """Suite, settings, model, versions and hardware."""
    return {
        "run_version": RUN_VERSION,
        "suite": work.to_json(),
        "settings": judge.settings_record,
        "settings_hash": judge.settings_hash,
        "model": dict(judge.model),
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
        "hardware": {**hardware(), "device": judge.backend.device},
    }


def describe_artifact(path: Path) -> dict[str, Any]:
    """What run.json says of the model's file: path, size in bytes and the manifest, where there is one."""
    from gramlite.formats.artifact import artifact_bytes, read_manifest

    manifest = read_manifest(path)
    return {
        "path": str(path.resolve()),
        "bytes": artifact_bytes(path),
        "manifest": asdict(manifest) if manifest else None,
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def print_score(folder: Path, record: Mapping[str, Any], *, as_json: bool) -> None:
    """The score on standard output."""
    score = record["score"]
    if as_json or not sys.stdout.isatty():
        summary = {key: record[key] for key in ("name", "rows", "no_verdict", "seconds", "seconds_per_pair", "score")}
        say_json({"run": str(folder), **summary})
        return
    for name, value in score["scores"].items():
        shown = "–" if value is None else f"{100 * value:.2f} %"
        say(f"{visible(name):<40} {shown}{'  *' if name == score['headline'] else ''}")
    say(
        f"n = {score['n']:,}, without a verdict {score['no_verdict']:,}, not judged {score['missing']:,}",
        *score["notes"],
    )


@click.command(help=HELP)
@click.argument("suite", metavar="SUITE[/SUBSET][:FILE]")
@judge_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="RUN_FOLDER", help="Where to.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Judge the first N pairs only.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Judge N pairs drawn by a hash of their ids.")
@click.option("--longest", type=click.IntRange(1), metavar="N", help="Leave out pairs of more than N characters.")
@labels_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, or with a larger --limit.")
@click.option("--force", is_flag=True, help="Start an existing run anew.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal.")
def command(
    options: JudgeOptions,
    suite: str,
    output: Path,
    limit: int | None,
    sample: int | None,
    longest: int | None,
    labels: LabelMeanings | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Judge a suite and print its score."""
    from gramlite.rows.display import Display

    say_rows_on_interrupt(output / ROWS, output)
    work = load_work(suite, limit, sample=sample, longest=longest, labels=labels)
    check_run_folder(
        output, [work.path if work.path.is_file() else None, *options.inputs()], resume=resume, force=force
    )
    path = options.artifact_path()
    with ExitStack() as stack:
        judge = stack.enter_context(options.open())
        display = stack.enter_context(Display(as_json=as_json, quiet=True, total=len(work.pairs)))
        about = {"model": {**judge.model, **describe_artifact(path)}, "deterministic": options.deterministic}
        record = run_suite(judge, work, output, display=display, resume=resume, force=force, about=about)
        display.close()
    print_score(output, record, as_json=as_json)
    return SOME_ROWS_WITHOUT_VERDICT if record["no_verdict"] else 0
