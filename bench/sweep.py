"""`gramlite bench sweep`: make a judge in many types, judge the suites with each, and compare all with the first.

    FOLDER/sweep.json            what was asked, and what became of each type
    FOLDER/artifacts/            the models, with what they were made of; kept and verified, made again only when due
    FOLDER/runs/SUITE/TYPE/      run folders, gone on with where they end
    FOLDER/results.md, .csv      the table; report*.html beside it with --report

A type that fails is left with its reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, GramliteError, IntegrityError
from gramlite.formats.artifact import artifact_sha256, read_manifest
from gramlite.formats.gguf_header import read_header
from gramlite.formats.quantization import bits_per_weight
from gramlite.interrupt import say_on_interrupt
from gramlite.options import JudgeOptions, chat_options, labels_option
from gramlite.rows import identifier_text

from .builder import Builder, build_in_child, remove_leftovers
from .folder import ROWS, Run, read_record, read_run
from .gate import Gate, gate_options
from .plan import LOCK, SweepPlan, check_folder, judge_settings, read_plan, write_record
from .progress import SweepProgress
from .results import check_outputs, write_results
from .run import describe_artifact, run_suite
from .sweep_result import POOLED, SweepEntry, SweepResult, compare_all
from .variants import Variant, artifact_target
from .work import SuiteWork


def sweep(plan: SweepPlan, builder: Builder, progress: SweepProgress, *, seed: int = 0) -> SweepResult:
    """Make, judge and compare every type of a plan; what is there is used.

    Raises whatever the base fails with, since nothing can be compared without it, and IntegrityError for a folder
    of another sweep.
    """
    entries: list[SweepEntry] = []
    for variant in plan.variants:
        progress.start(variant.name)
        entry = sweep_one(plan, variant, builder, progress)
        entries.append(entry)
        progress.finish(variant.name, entry.failure)
        write_record(plan, entries)
    return compare_all(entries, seed=seed)


def sweep_one(plan: SweepPlan, variant: Variant, builder: Builder, progress: SweepProgress) -> SweepEntry:
    """Make one type and judge every suite with it."""
    entry = SweepEntry(variant.name)
    runs: dict[str, Run] = {}
    try:
        path = variant.path or builder.ensure(artifact_target(variant, plan.source, plan.folder / "artifacts"))
        progress.made()
        entry = replace(entry, size_bytes=describe_artifact(path)["bytes"], bits_per_weight=bits_of(path), runs=runs)
        judge_suites(plan, variant, path, runs, progress)
    except (GramliteError, OSError) as error:
        if variant is plan.variants[0]:
            raise
        return replace(entry, failure=str(error))
    return entry


def judge_suites(plan: SweepPlan, variant: Variant, path: Path, runs: dict[str, Run], progress: SweepProgress) -> None:
    """Judge the suites that are not yet judged with a model and add all runs to `runs`; the model is opened once."""
    with ExitStack() as stack:
        judge = None
        for key, work in plan.works.items():
            folder = plan.folder / "runs" / key / variant.file_name
            progress.judge(key, len(work.pairs))
            if not is_judged(folder, work, path, plan.options):
                if judge is None:
                    judge = stack.enter_context(replace(plan.options, model=str(path)).open())
                about = {
                    "name": variant.name,
                    "model": {**judge.model, **describe_artifact(path)},
                    "asked": judge_settings(plan.options),
                }
                resume = (folder / ROWS).exists()
                try:
                    run_suite(judge, work, folder, display=progress, resume=resume, about=about)
                except IntegrityError:
                    if not plan.force:
                        raise
                    run_suite(judge, work, folder, display=progress, force=True, about=about)
            runs[key] = read_wanted(folder, work)
            progress.judged(runs[key].seconds_per_pair)


def is_judged(folder: Path, work: SuiteWork, model: Path, options: JudgeOptions) -> bool:
    """Whether a run folder holds a verdict on every pair, by this model with these settings."""
    record = read_record(folder)
    wanted = work.to_json()["pairs_sha256"]
    return (
        bool(record.get("finished"))
        and record.get("no_verdict") == 0
        and record.get("asked") == judge_settings(options)
        and (record.get("suite") or {}).get("pairs_sha256") == wanted
        and (record.get("model") or {}).get("sha256") == artifact_sha256(model)
    )


def read_wanted(folder: Path, work: SuiteWork) -> Run:
    """A run without the rows that an earlier sweep of more pairs has left."""
    run = read_run(folder)
    wanted = {identifier_text(pair.id) for pair in work.pairs}
    return replace(run, rows={identifier: row for identifier, row in run.rows.items() if identifier in wanted})


def bits_of(path: Path) -> float | None:
    """Bits per weight by the manifest, else by the file's own header."""
    manifest = read_manifest(path)
    if manifest and manifest.bits_per_weight:
        return manifest.bits_per_weight
    if path.suffix != ".gguf":
        return None
    return bits_per_weight(read_header(path))


def run_sweep(plan: SweepPlan, *, seed: int = 0) -> SweepResult:
    """Sweep in the plan's folder, which one process may hold at a time."""
    artifacts = plan.folder / "artifacts"
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(plan.folder / LOCK), timeout=0):
            check_folder(plan)
            write_record(plan, [])
            artifacts.mkdir(exist_ok=True)
            remove_leftovers(artifacts)
            pairs = sum(len(work.pairs) for work in plan.works.values())
            with SweepProgress(types=len(plan.variants), pairs=pairs) as progress:
                builder = Builder(partial(build_in_child, log=plan.folder / "log.txt"), progress.make)
                return sweep(plan, builder, progress, seed=seed)
    except Timeout:
        raise IntegrityError(
            f"{plan.folder} is being swept by another process. Wait for it, or choose another -o."
        ) from None


# --- the command ---------------------------------------------------------------------------------------------


OPTIONS = (
    click.option("--types", required=True, metavar="TYPES",
                 help="F16,Q8_0,Q4_K_M,Q4_K_M+imatrix,gptq:4x64,...; the first is the base."),
    click.option("--suite", "suites", multiple=True, required=True, metavar="SUITE[/SUBSET][:FILE]",
                 help="What to judge; may be given several times."),
    labels_option,
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Judge the first N pairs of each suite."),
    click.option("--sample", metavar="N[,N...]",
                 help="Judge N pairs of each suite, drawn by a hash of their ids; or one N for each --suite."),
    click.option("--longest", type=click.IntRange(1), metavar="N", help="Leave out pairs of more than N characters."),
    click.option("--calibration", type=click.Path(path_type=Path), metavar="PAIRS.jsonl",
                 help="Pairs or transcripts for +imatrix, auto and gptq."),
    click.option("--tokens", type=click.IntRange(1), default=65_536, show_default=True, metavar="N",
                 help="Budget of calibration tokens."),
    click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Where to."),
    click.option("--report", is_flag=True, help="Write an HTML report for each suite."),
    click.option("--page", type=click.Path(path_type=Path), metavar="FILE.md",
                 help="Write the results as a page that says what they mean."),
    click.option("--template", metavar="NAME|FILE", help="The judge's template.  [default: that of the model card]"),
    chat_options,
    click.option("--mode", type=click.Choice(["think", "direct"]), default="direct", show_default=True,
                 help="Write a rationale first, or answer in one forward pass."),
    click.option("--orders", type=click.Choice(["both", "ab"]), default="both", show_default=True,
                 help="Judge each pair as given and swapped, or only as given."),
    click.option("--votes", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="K",
                 help="Rationales sampled for each order."),
    click.option("--budget", type=click.IntRange(1), default=1024, show_default=True, metavar="N",
                 help="Most tokens a rationale may take."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N",
                 help="Seed of the calibration, of sampling and of the bootstrap."),
    click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
                 help="Where to judge."),
    click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: the physical cores]"),
    click.option("--context", type=click.IntRange(64), metavar="N", help="Most tokens of a prompt and its rationale."),
    click.option("--deterministic", is_flag=True, help="One sequence at a time: the same bits for the same input."),
    click.option("--force", is_flag=True, help="Make anew what is in FOLDER and does not fit."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal."),
)  # fmt: skip


def sweep_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command("sweep")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@sweep_options
@gate_options
def command(gate: Gate, **options: Any) -> int:
    """Quantize CHECKPOINT in many ways, judge the suites with each, and compare all with the first type.

    One command, to be left alone: it goes on where it was stopped when it is typed again. A type is F16, BF16 or F32;
    one of llama.cpp's (Q8_0, Q4_K_M, IQ4_XS, ...), with +imatrix calibrated; auto:4.5bpw; gptq:BITSxGROUP with the options
    :asym, :no-focus, :q8_0 (the embedding's type) and :PART=BITS; or NAME=PATH, a model of any format that is there.
    """
    plan = read_plan(**options)
    check_outputs(plan, options["page"], gate.junit)
    say_on_interrupt(lambda: f"What is done is in {plan.folder}; type the same command to go on.")
    swept = run_sweep(plan, seed=options["seed"])
    suites = [suite for suite in swept.comparisons if suite != POOLED]
    findings = [
        replace(finding, run=f"{finding.run} on {suite}" if len(suites) > 1 else finding.run)
        for suite in suites
        for comparison in swept.comparisons[suite].values()
        for finding in gate.evaluate(comparison)
    ]
    write_results(plan, swept, findings, report=options["report"], page=options["page"], as_json=options["as_json"])
    gate.tell(findings)
    missing = any(
        row.get("verdict") is None for e in swept.entries for run in e.runs.values() for row in run.rows.values()
    )
    return SOME_ROWS_WITHOUT_VERDICT if missing or any(entry.failure for entry in swept.entries) else 0
