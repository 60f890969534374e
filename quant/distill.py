"""Tune the scales of a GPTQ folder, codes untouched, until its verdicts come nearer to those of the checkpoint it is of.

The second phase of EfficientQAT (Chen et al., 2407.11062), with the source model as teacher and judging as the task:
what is trained for is the verdict's margin, in direct mode and behind the teacher's rationales, and those rationales.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from gramlite.export.checkpoint import Checkpoint, open_checkpoint
from gramlite.export.publish import describe_source, judge_template, manifest_text, tool_versions, write_durably
from gramlite.export.report import compression, judge_command
from gramlite.export.save_tensors import save_tensors
from gramlite.export.smoke import recorded_margins, smoke_judge, smoke_option

from gramlite.artifact import FOLDER_MANIFEST, Manifest, artifact_bytes, hash_files, read_manifest, verify_files
from gramlite.errors import IntegrityError, ModelError, ResourceError
from gramlite.storage import atomic_output, check_output, remove_path, sha256_cached

from .calibration import DEFAULT_TOKENS
from .gptq import digest
from .gptq_folder import GptqFolder, GptqWriter, open_gptq
from .lessons import SHEET_TOKENS, Lesson, Target, ask_teacher, hold_back, sheets
from .memory import PROCESS_BYTES, PeakMemory, free_bytes, pick_device
from .packages import need_packages
from .report import Progress, layer_bar, print_figures
from .syllabus import Syllabus, load_syllabus
from .trainable import Student, check_shapes, load_teacher, predict_bytes
from .training import Course, Outcome, TrainingSettings, settings_key, train

logger = logging.getLogger("gramlite")


@dataclass(frozen=True, kw_only=True)
class DistillReport:
    """What a run did: the scores on lessons held back before and after, time in seconds, memory in bytes."""

    output: Path
    outcome: Outcome
    scales: int
    lessons: int
    held_back: int
    seconds: float
    peak_bytes: int
    predicted_bytes: int
    bits_per_weight: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.output),
            "format": "gptq",
            "bits_per_weight": self.bits_per_weight,
            "scales": self.scales,
            "lessons": self.lessons,
            "held_back": self.held_back,
            "before": asdict(self.outcome.before),
            "after": asdict(self.outcome.after),
            "best_epoch": self.outcome.best_epoch,
            "finished": self.outcome.finished,
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "predicted_bytes": self.predicted_bytes,
        }


def distill(
    source: Path,
    teacher: Path,
    output: Path,
    syllabus: Syllabus,
    settings: TrainingSettings,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    template: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DistillReport:
    """Train the scales of the GPTQ folder `source` and write the folder `output`, which has the same codes and size.

    `<output>.distill` holds what is needed to go on after a stop; it is removed when training reaches its end. After
    `minutes` training halts, the best so far is written, and the same call with `force` goes on.
    Raises InputError for unusable lessons, ModelError for a folder and a teacher that don't belong together,
    ResourceError where memory won't do, IntegrityError where other training was left behind beside `output`.
    """
    started = time.monotonic()
    progress = progress or (lambda stage, done, total: None)
    check_output(output, [source, teacher], force=force)
    origin = read_manifest(source)
    if origin:
        verify_files(source, origin)
    folder, checkpoint = open_gptq(source), open_checkpoint(teacher)
    check_shapes(folder, checkpoint)
    learnt, tested = hold_back(syllabus.lessons, settings.held_back, settings.seed)
    predicted, recompute = check_memory(checkpoint, folder, syllabus.lessons, device)
    described = describe_source(teacher, {file.name: sha256_cached(file) for file in checkpoint.files})
    pieces = {file.name: sha256_cached(file) for file in folder.files}
    key = settings_key(settings, teacher=described["sha256"], folder=pieces, lessons=syllabus.described["sha256"])
    work = work_folder(output)
    room = sum(tensor.bytes for tensor in folder.tensors.values())
    with (
        atomic_output(output, force=force, need_bytes=room) as temporary,
        alone_in(work),
        PeakMemory(device) as memory,
    ):
        model = load_teacher(checkpoint, device, recompute=recompute)
        targets = ask_all(model, syllabus, work / "targets.safetensors", key, progress)
        student = Student(model, folder, norms=settings.norms, seed=settings.seed)
        outcome = train(
            student,
            Course(learnt, tested, targets, syllabus.choices, settings),
            state_file=work / "state.safetensors",
            key=key,
            deadline=math.inf if minutes is None else started + 60 * minutes,
            progress=progress,
        )
        write_folder(student, temporary)
        manifest = Manifest(
            format="gptq",
            name=output.name,
            quantization=origin.quantization if origin else None,
            method="distill",
            source=described | {"gptq": {"name": source.resolve().name, "files": pieces}},
            settings=_kept(origin) | {"distill": asdict(settings) | _figures(outcome, len(learnt), len(tested))},
            calibration=syllabus.described,
            tools=tool_versions("torch", "transformers", "safetensors"),
            template=template or (origin.template if origin else None),
            bits_per_weight=origin.bits_per_weight if origin else None,
            files=hash_files(temporary),
        )
        write_durably(temporary / FOLDER_MANIFEST, manifest_text(manifest))
    if outcome.finished:
        remove_path(work)
    return DistillReport(
        output=output,
        outcome=outcome,
        scales=student.logarithms.numel(),
        lessons=len(learnt),
        held_back=len(tested),
        seconds=time.monotonic() - started,
        peak_bytes=memory.peak,
        predicted_bytes=predicted,
        bits_per_weight=manifest.bits_per_weight,
    )


def work_folder(output: Path) -> Path:
    """Where a run leaves what it needs to go on."""
    return output.with_name(f"{output.name}.distill")


@contextmanager
def alone_in(work: Path) -> Iterator[None]:
    """Make the folder and hold it; raises IntegrityError while another process does."""
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(work / "lock"), timeout=0):
            yield
    except Timeout as error:
        raise IntegrityError(f"{work} is in use by another process. Wait for it, or choose another -o.") from error


def check_memory(
    checkpoint: Checkpoint, folder: GptqFolder, lessons: tuple[Lesson, ...], device: str
) -> tuple[int, bool]:
    """The bytes that training will take, and whether activations must be computed twice for them to fit.

    Raises ResourceError where not even that is enough.
    """
    free = free_bytes(device)
    longest = max(SHEET_TOKENS, *(lesson.tokens for lesson in lessons))
    spoken = max(lesson.spoken for lesson in lessons)
    process = PROCESS_BYTES if device == "cpu" else 0
    for recompute in (False, True):
        needed = process + predict_bytes(checkpoint.config, folder, longest, spoken, recompute=recompute)
        if needed <= free:
            return needed, recompute
    raise ResourceError(
        f"Training takes {needed / 1e9:,.1f} GB for prompts of up to {longest:,} tokens, and {free / 1e9:,.1f} GB are "
        "free. Give shorter pairs, or another --device."
    )


def ask_all(model: Any, syllabus: Syllabus, file: Path, key: str, progress: Progress) -> dict[Lesson, Target]:
    """The teacher's targets of all lessons, from `file` where an earlier run left them there."""
    from safetensors import SafetensorError, safe_open

    parts = ("margins", "tokens", "shares", "states")
    try:
        with safe_open(file, "pt") as stored:
            if stored.metadata()["key"] == key:
                return {
                    lesson: Target(*(stored.get_tensor(f"{part}.{number}") for part in parts))
                    for number, lesson in enumerate(syllabus.lessons)
                }
    except (OSError, SafetensorError, KeyError, TypeError):
        pass  # there is none, or it is torn: the teacher is asked again
    targets: dict[Lesson, Target] = {}
    for sheet in sheets(syllabus.lessons):
        targets |= zip(sheet, ask_teacher(model, sheet, syllabus.choices), strict=True)
        progress("Asking the teacher", len(targets), len(syllabus.lessons))
    tensors = {
        f"{part}.{number}": getattr(targets[lesson], part)
        for number, lesson in enumerate(syllabus.lessons)
        for part in parts
    }
    with atomic_output(file, force=True) as temporary:
        save_tensors(tensors, temporary, metadata={"key": key})
    return targets


def write_folder(student: Student, folder: Path) -> None:
    """Write the tuned GPTQ folder: all that was in the old one, with new scales and norms; then read it back."""
    source, norms, digests = student.folder, student.norms(), {}
    folder.mkdir()
    writer = GptqWriter(folder)
    for name, linear in student.linears():
        writer.add_linear(name, linear)
        digests[name] = digest(linear)
    quantized = {f"{name}.{part}" for name in source.linears for part in ("qweight", "qzeros", "scales", "g_idx")}
    for name in source.tensors:
        if name not in quantized:
            writer.add(name, norms[name] if name in norms else source.read_float(name).astype(np.float16))
    config = dict(source.config)
    quantization = config.pop("quantization_config", None) or json.loads(
        (source.folder / "quantize_config.json").read_text(encoding="utf-8")
    )
    writer.finish(config, quantization | {"checkpoint_format": "gptq"}, source.folder)
    written = open_gptq(folder)
    for name, expected in digests.items():
        if digest(written.read_linear(name)) != expected:
            raise ModelError(f"{name} did not come back from the disk as it was written. Check the disk and try again.")


def _kept(origin: Manifest | None) -> dict[str, Any]:
    """What the older manifest says that is still true."""
    settings = dict(origin.settings) if origin else {}
    settings.pop("layer_errors", None)
    return settings | ({"gptq_calibration": origin.calibration} if origin else {})


def _figures(outcome: Outcome, learnt: int, tested: int) -> dict[str, Any]:
    return {
        "lessons": learnt,
        "lessons_held_back": tested,
        "before": asdict(outcome.before),
        "after": asdict(outcome.after),
        "best_epoch": outcome.best_epoch,
        "steps": outcome.steps,
        "finished": outcome.finished,
        "history": list(outcome.history),
    }


def print_report(report: DistillReport, manifest: Manifest, *, as_json: bool) -> None:
    """Print a run's figures to stdout: a table on a terminal, else one JSON object."""
    output, smaller = report.output, compression(report.output, manifest)
    size = artifact_bytes(output, manifest)
    figures = report.to_json() | {"bytes": size, "compression": None if smaller is None else round(smaller, 3)}
    before, after = report.outcome.before, report.outcome.after
    rows = [
        ("folder", str(output)),
        ("size", f"{size / 1e6:,.1f} MB" + (f", {smaller:.2f} times smaller than its teacher" if smaller else "")),
        ("tuned", f"{report.scales:,} scales on {report.lessons} prompts, {report.held_back} held back"),
        ("margin error, held back", f"{before.margin_error:.3f} → {after.margin_error:.3f} nats"),
        ("rationales' divergence", f"{before.divergence:.4f} → {after.divergence:.4f} nats a token"),
        ("states' relative error", f"{before.state_error:.5f} → {after.state_error:.5f}"),
        ("best epoch", f"{report.outcome.best_epoch:g} of {len(report.outcome.history) - 1}"),
        ("time", f"{report.seconds:,.0f} s"),
        ("peak memory", f"{report.peak_bytes / 1e6:,.0f} MB"),
    ]
    print_figures(figures, rows, command=judge_command(output, manifest), as_json=as_json, smoke=manifest.smoke)


@click.command("distill", short_help="GPTQ -> GPTQ, scales tuned to the source model's verdicts")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="The checkpoint that was quantized.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--calibration", required=True, type=click.Path(path_type=Path), help="Pairs or transcripts, JSONL.")
@click.option(
    "--mode",
    type=click.Choice(["think", "direct"]),
    default="think",
    show_default=True,
    help="Rationales and direct verdicts, or direct verdicts alone, which needs none written.",
)
@click.option("--tokens", type=int, default=DEFAULT_TOKENS, show_default=True, help="Budget of calibration tokens.")
@click.option("--epochs", type=click.IntRange(1), default=TrainingSettings.epochs, show_default=True)
@click.option("--lr", type=click.FloatRange(0, 0.1, min_open=True), default=TrainingSettings.rate, show_default=True,
              help="The first step, as a share of each scale.")  # fmt: skip
@click.option("--norms/--no-norms", default=False, show_default=True, help="Train the norms' weights too.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Draws prompts, their order, and what is held back."
)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Halt after this time; --force goes on.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default the recorded one.")
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path, teacher: Path, output: Path, calibration: Path, smoke: bool, as_json: bool, **options: Any
) -> None:
    """Tune the scales of a GPTQ FOLDER, codes untouched, until it judges more like the checkpoint it was made of."""
    need_packages("gptq", "torch", "transformers")
    check_output(output, [folder, teacher, calibration], force=options["force"])
    settings = TrainingSettings(
        epochs=options["epochs"], rate=options["lr"], norms=options["norms"], seed=options["seed"]
    )
    device = pick_device(options["device"])
    template = judge_template(folder, options["template"]) or judge_template(teacher, options["template"])
    try:
        syllabus = load_syllabus(
            calibration,
            teacher,
            template=template,
            mode=options["mode"],
            tokens=options["tokens"],
            seed=options["seed"],
            choice=options["template"],
            keep=work_folder(output),
        )
        with layer_bar() as progress:
            report = distill(
                folder,
                teacher,
                output,
                syllabus,
                settings,
                device=device,
                minutes=options["minutes"],
                template=template,
                force=options["force"],
                progress=progress,
            )
    except KeyboardInterrupt:
        logger.warning("Interrupted. The same command goes on; %s holds what it needs.", work_folder(output))
        raise
    if not report.outcome.finished:
        logger.warning(
            "Time ran out before the last epoch; the best so far was written. The same command with --force goes on."
        )
    manifest = read_manifest(output)
    assert manifest is not None
    if smoke:
        expected = recorded_margins(read_manifest(folder), manifest.template) or teacher
        manifest = smoke_judge(output, manifest, expected, template=options["template"], force=options["force"])
    print_report(report, manifest, as_json=as_json)
