"""`gramlite bench sweep`: make a judge in many types, judge the suites with each, and compare all with the first.

    FOLDER/sweep.json            what was asked, and what became of each type
    FOLDER/artifacts/            the models, with what they were made of; kept and verified, made again only when due
    FOLDER/runs/SUITE/TYPE/      run folders, gone on with where they end
    FOLDER/results.md, .csv      the table; report*.html beside it with --report

A type that fails is left with its reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, GramliteError, InputError, IntegrityError
from gramlite.interrupt import say_on_interrupt
from gramlite.options import chat_options, labels_option
from gramlite.rows import identifier_text
from gramlite.storage import sha256_cached, write_json
from gramlite.terminal import note

if TYPE_CHECKING:
    from gramlite.options import JudgeOptions

    from .folder import Run
    from .parts import Workshop
    from .progress import SweepProgress
    from .run import Work
    from .swept import Entry, Swept
    from .variants import Source, Variant

RECORD = "sweep.json"
LOCK = "sweep.lock"


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do: the types, the base first, and the suites by the names of their folders."""

    folder: Path
    source: Source
    variants: Sequence[Variant]
    works: Mapping[str, Work]
    options: JudgeOptions
    force: bool = False

    def record(self) -> dict[str, Any]:
        """What everything in the folder must have in common."""
        suites = {key: work.to_json() for key, work in self.works.items()}
        return {
            **self.source.record(),
            "settings": judge_settings(self.options),
            "suites": {
                key: {name: suite[name] for name in ("name", "subset", "sha256", "labels")}
                for key, suite in suites.items()
            },
        }


def sweep(plan: Plan, workshop: Workshop, progress: SweepProgress, *, seed: int = 0) -> Swept:
    """Make, judge and compare every type of a plan; what is there is used.

    Raises whatever the base fails with, since nothing can be compared without it, and IntegrityError for a folder
    of another sweep.
    """
    from .swept import compare_all

    entries: list[Entry] = []
    for variant in plan.variants:
        progress.start(variant.name)
        entry = sweep_one(plan, variant, workshop, progress)
        entries.append(entry)
        progress.finish(variant.name, entry.failure)
        write_record(plan, entries)
    return compare_all(entries, seed=seed)


def sweep_one(plan: Plan, variant: Variant, workshop: Workshop, progress: SweepProgress) -> Entry:
    """Make one type and judge every suite with it."""
    from .run import describe_artifact
    from .swept import Entry
    from .variants import artifact_part

    entry = Entry(variant.name)
    runs: dict[str, Run] = {}
    try:
        path = variant.path or workshop.ensure(artifact_part(variant, plan.source, plan.folder / "artifacts"))
        progress.made()
        entry = replace(entry, size_bytes=describe_artifact(path)["bytes"], bits_per_weight=bits_of(path), runs=runs)
        judge_suites(plan, variant, path, runs, progress)
    except (GramliteError, OSError) as error:
        if variant is plan.variants[0]:
            raise
        return replace(entry, failure=str(error))
    return entry


def judge_suites(plan: Plan, variant: Variant, path: Path, runs: dict[str, Run], progress: SweepProgress) -> None:
    """Judge the suites that are not yet judged with a model and add all runs to `runs`; the model is opened once."""
    from .run import describe_artifact, run_suite

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
                resume = (folder / "rows.jsonl").exists()
                try:
                    run_suite(judge, work, folder, display=progress, resume=resume, about=about)
                except IntegrityError:
                    if not plan.force:
                        raise
                    run_suite(judge, work, folder, display=progress, force=True, about=about)
            runs[key] = read_wanted(folder, work)
            progress.judged(runs[key].seconds_per_pair)


def is_judged(folder: Path, work: Work, model: Path, options: JudgeOptions) -> bool:
    """Whether a run folder holds a verdict on every pair, by this model with these settings."""
    from gramlite.loading import artifact_sha256

    from .folder import read_record

    record = read_record(folder)
    wanted = work.to_json()["pairs_sha256"]
    return (
        bool(record.get("finished"))
        and record.get("no_verdict") == 0
        and record.get("asked") == judge_settings(options)
        and (record.get("suite") or {}).get("pairs_sha256") == wanted
        and (record.get("model") or {}).get("sha256") == artifact_sha256(model)
    )


def read_wanted(folder: Path, work: Work) -> Run:
    """A run without the rows that an earlier sweep of more pairs has left."""
    from .folder import read_run

    run = read_run(folder)
    wanted = {identifier_text(pair.id) for pair in work.pairs}
    return replace(run, rows={identifier: row for identifier, row in run.rows.items() if identifier in wanted})


def judge_settings(options: JudgeOptions) -> dict[str, Any]:
    """The judging options that a verdict depends on."""
    names = "template chat_template mode orders votes temperature budget seed delimiters deterministic".split()
    asked = {name: getattr(options, name) for name in names}
    files = {name: Path(asked[name]) for name in names[:2] if asked[name] and Path(asked[name]).is_file()}
    return asked | {name: f"{path} {sha256_cached(path)}" for name, path in files.items()}


def bits_of(path: Path) -> float | None:
    """Bits per weight by the manifest, else by the file's own header."""
    from gramlite.formats.artifact import read_manifest
    from gramlite.formats.gguf_header import read_header
    from gramlite.formats.quantization import bits_per_weight

    manifest = read_manifest(path)
    if manifest and manifest.bits_per_weight:
        return manifest.bits_per_weight
    if path.suffix != ".gguf":
        return None
    return bits_per_weight(read_header(path))


# --- the folder ----------------------------------------------------------------------------------------------


def check_outputs(plan: Plan, page: Path | None, junit: Path | None) -> None:
    """Raise InputError for a folder, a page or a file of outcomes that is not a sweep's, before any work is done."""
    from gramlite.storage import check_file, check_note

    from .gate import GATE
    from .results import check_page

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


def check_folder(plan: Plan) -> None:
    """Raise IntegrityError where the folder holds a sweep of another checkpoint, other suites or settings."""
    import json

    from gramlite.rows.journal import differences

    path = plan.folder / RECORD
    if not path.is_file() or plan.force:
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["asked"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}). Choose another -o, or add --force.") from error
    now = plan.record()
    shared = before["suites"].keys() & now["suites"].keys()
    for side in (before, now):
        side["suites"] = {key: side["suites"][key] for key in shared}
    if before["calibration"] is None or now["calibration"] is None:
        before.pop("calibration"), now.pop("calibration")
    if changes := differences(before, now):
        raise IntegrityError(
            f"{plan.folder} holds a sweep that was made differently: {'; '.join(changes)}. "
            "Choose another -o, or add --force to make anew what does not fit."
        )


def write_record(plan: Plan, entries: Sequence[Entry]) -> None:
    """Write what was asked and what became of the types so far."""
    outcomes = [
        {
            "type": entry.name, "bytes": entry.size_bytes, "bits_per_weight": entry.bits_per_weight,
            "runs": {suite: str(run.path.relative_to(plan.folder)) for suite, run in entry.runs.items()},
            "failure": entry.failure,
        }
        for entry in entries
    ]  # fmt: skip
    write_json(plan.folder / RECORD, {"asked": plan.record(), "types": outcomes})


def name_works(works: Sequence[Work]) -> dict[str, Work]:
    """The suites by folder name: the suite's own, with the file's where a suite is there twice."""
    plain = [work.title.replace("/", "-") for work in works]
    named = {
        name if plain.count(name) == 1 else f"{name}-{work.path.name.partition('.')[0]}": work
        for name, work in zip(plain, works, strict=True)
    }
    if len(named) < len(works):
        raise InputError("--suite names the same suite and file name twice.")
    return named


def run_sweep(plan: Plan, *, seed: int = 0) -> Swept:
    """Sweep in the plan's folder, which one process may hold at a time."""
    from filelock import FileLock, Timeout

    from .parts import Workshop, in_child, sweep_leftovers
    from .progress import SweepProgress

    artifacts = plan.folder / "artifacts"
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(plan.folder / LOCK), timeout=0):
            check_folder(plan)
            write_record(plan, [])
            artifacts.mkdir(exist_ok=True)
            sweep_leftovers(artifacts)
            pairs = sum(len(work.pairs) for work in plan.works.values())
            with SweepProgress(types=len(plan.variants), pairs=pairs) as progress:
                workshop = Workshop(partial(in_child, log=plan.folder / "log.txt"), progress.make)
                return sweep(plan, workshop, progress, seed=seed)
    except Timeout:
        raise IntegrityError(
            f"{plan.folder} is being swept by another process. Wait for it, or choose another -o."
        ) from None


# --- the command ---------------------------------------------------------------------------------------------


def read_plan(*, checkpoint: Path, types: str, suites: Sequence[str], output: Path, **options: Any) -> Plan:
    """The plan that a command line describes; raises InputError before anything is made."""
    from gramlite.options import JudgeOptions

    from .run import load_work
    from .suites import takes_labels
    from .variants import Source, parse_types

    variants = parse_types(types)
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is no checkpoint: it holds no config.json. Give a Hugging Face folder.")
    calibration = options["calibration"]
    if calibration is None and (due := next((variant.name for variant in variants if variant.is_calibrated), None)):
        raise InputError(f"{due} is calibrated on judging: add --calibration PAIRS.jsonl, pairs or transcripts.")
    if calibration and not calibration.is_file():
        raise InputError(f"There is no file {calibration}. Give --calibration a JSONL file of pairs or of transcripts.")
    source = Source(
        checkpoint=checkpoint.resolve(), calibration=calibration and calibration.resolve(),
        **{name: options[name] for name in "tokens seed mode template chat threads".split()},
    )  # fmt: skip
    judging = JudgeOptions(
        model=None, adapter=None, temperature=None, delimiters="neutralize", parallel=None,
        chat_template=options["chat"].choice, trust_template=options["chat"].trust,
        **{name: options[name] for name in "template mode orders votes budget seed device threads context deterministic".split()},
    )  # fmt: skip
    samples = read_samples(options["sample"], len(suites))
    explained = [suite for suite in suites if takes_labels(suite)] or suites
    works = [
        load_work(
            suite, options["limit"], sample=count, longest=options["longest"],
            labels=options["labels"] if suite in explained else None,
        )
        for suite, count in zip(suites, samples, strict=True)
    ]  # fmt: skip
    return Plan(output.resolve(), source, variants, name_works(works), judging, options["force"])


def read_samples(text: str | None, suites: int) -> list[int | None]:
    """How many pairs of each suite are drawn; raises InputError for what is no number for all or for each."""
    if text is None:
        return [None] * suites
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if len(counts) not in (1, suites) or min(counts) < 1:
        raise InputError(f"--sample {text} is neither a number for all suites nor one for each of {suites}.")
    return [*(counts * suites if len(counts) == 1 else counts)]


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
    click.option("--gate", metavar="CLAUSES",
                 help="Conditions on every type, as in 'accuracy>=-1.0,flips<=3'; exit 7 if not."),
    click.option("--undecided", type=click.Choice(["pass", "fail"]), default="fail", show_default=True,
                 help="What an undecidable clause counts as."),
    click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the gate's outcome as JUnit XML."),
    click.option("--github", is_flag=True, help="Annotate the gate's outcome for GitHub Actions, on standard error."),
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
def command(**options: Any) -> int:
    """Quantize CHECKPOINT in many ways, judge the suites with each, and compare all with the first type.

    One command, to be left alone: it goes on where it was stopped when it is typed again. A type is F16, BF16 or F32;
    one of llama.cpp's (Q8_0, Q4_K_M, IQ4_XS, ...), with +imatrix calibrated; auto:4.5bpw; gptq:BITSxGROUP with the options
    :asym, :no-focus, :q8_0 (the embedding's type) and :PART=BITS; or NAME=PATH, a model of any format that is there.
    """
    from .gate import enforce, evaluate, github_annotations, parse_gate, write_junit
    from .results import write_results
    from .swept import POOLED

    clauses = parse_gate(options["gate"]) if options["gate"] else []
    if (options["junit"] or options["github"]) and not clauses:
        raise InputError("--junit and --github tell what became of a gate; add --gate 'accuracy>=-1.0,flips<=3'.")
    plan = read_plan(**options)
    check_outputs(plan, options["page"], options["junit"])
    say_on_interrupt(lambda: f"What is done is in {plan.folder}; type the same command to go on.")
    swept = run_sweep(plan, seed=options["seed"])
    suites = [suite for suite in swept.comparisons if suite != POOLED]
    findings = [
        replace(finding, run=f"{finding.run} on {suite}" if len(suites) > 1 else finding.run)
        for suite in suites
        for comparison in swept.comparisons[suite].values()
        for finding in evaluate(comparison, clauses)
    ]
    write_results(plan, swept, findings, report=options["report"], page=options["page"], as_json=options["as_json"])
    if options["junit"]:
        write_junit(options["junit"], findings, undecided=options["undecided"])
    if options["github"]:
        note(*github_annotations(findings, undecided=options["undecided"]))
    enforce(findings, undecided=options["undecided"])
    missing = any(
        row.get("verdict") is None for e in swept.entries for run in e.runs.values() for row in run.rows.values()
    )
    return SOME_ROWS_WITHOUT_VERDICT if missing or any(entry.failure for entry in swept.entries) else 0
