"""A checkpoint or an exact GGUF -> GGUF in any of llama.cpp's types, as they are or calibrated on judging."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from gramlite.export.options import ArtifactOptions, artifact_options
from gramlite.export.smoke import smoke_judge

from gramlite.errors import InputError
from gramlite.formats.artifact import Manifest
from gramlite.formats.carried import plan_notices
from gramlite.storage import check_output

from .calibrated import quantize_calibrated
from .calibration import calibration_options, load_calibration
from .gguf_file import check_belongs, quantize_source
from .imatrix import ImportanceMatrix, collect_importance, read_imatrix, write_imatrix
from .memory import pick_device
from .mixed import target_bits
from .packages import need_packages
from .report import layer_bar
from .source import ExactModel, open_source
from .tensor_types import named_overrides


def quantize_gguf(
    source: Path,
    destination: Path,
    *,
    kind: str,
    imatrix: ImportanceMatrix | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    template: str | None = None,
    force: bool = False,
    threads: int | None = None,
) -> Manifest:
    """Quantize an exact GGUF or a checkpoint folder to the llama.cpp type `kind` and return the manifest.

    `overrides` are pairs of a pattern (a regular expression found in the tensor's name) and that tensor's type; the
    first that fits counts. Raises InputError for a type that is unknown or lacks its importance matrix, ModelError
    for a source that is refused or quantized already, ResourceError when the disk is full.
    """
    with open_source(Path(source), beside=Path(destination), template=template) as opened:
        return quantize_source(
            opened, Path(destination), kind=kind, imatrix=imatrix, overrides=overrides, force=force, threads=threads
        )


def quantize_and_calibrate(
    source: Path,
    opened: ExactModel,
    output: Path,
    *,
    kind: str,
    calibration: Path,
    imatrix: ImportanceMatrix | None,
    save_imatrix: Path | None,
    overrides: Sequence[tuple[str, str]],
    force: bool,
    **how: Any,
) -> Manifest:
    """Judge the calibration's pairs as `how` says, measure the importance where none is given, and quantize."""
    if not source.is_dir():
        raise InputError(
            f"A calibration reads the checkpoint layer by layer, and {source} is a file. Give the checkpoint's folder "
            "as SOURCE; or calibrate once with --save-imatrix FILE, and give that as --imatrix."
        )
    transcripts, described = load_calibration(calibration, judge=opened.path, **how)
    device = pick_device(how["device"])
    if imatrix is None:
        with layer_bar() as progress:
            imatrix = collect_importance(
                source,
                transcripts,
                dataset=calibration.name,
                device=device,
                after_layer=lambda index: progress("Calibrating layer", index + 1, opened.blocks),
            )
    if save_imatrix:
        write_imatrix(save_imatrix, imatrix, force=force)
    return quantize_calibrated(
        source,
        opened,
        output,
        transcripts,
        kind=kind,
        imatrix=imatrix,
        overrides=overrides,
        calibration=described,
        device=device,
        force=force,
    )


def no_low_rank(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Tell who asks for a companion what there is in its place."""
    if value is not None:
        raise InputError(
            "--low-rank was removed. Take --type Q4_K_M --calibration PAIRS.jsonl, or --type auto:4.5bpw with the same."
        )


@click.command("gguf", short_help="checkpoint or GGUF -> GGUF in any of llama.cpp's types")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "kind",
    default="Q4_K_M",
    show_default=True,
    help="A llama.cpp type (Q2_K to Q8_0, IQ1_S to IQ4_XS), or auto:4.5bpw.",
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Pairs or transcripts, JSONL, to choose by.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="An importance matrix that is there already.")
@click.option("--save-imatrix", type=click.Path(path_type=Path), help="Write the importance matrix for another time.")
@click.option(
    "--tensor-type", "overrides", multiple=True, metavar="PATTERN=TYPE", help="Another type for some matrices."
)
@click.option("--embedding-type", metavar="TYPE", help="Another type for the embedding.")
@click.option("--output-type", metavar="TYPE", help="Another type for the head, which may be the embedding.")
@click.option(
    "--low-rank", hidden=True, is_flag=False, flag_value="", is_eager=True, expose_value=False, callback=no_low_rank
)
@calibration_options
@artifact_options("The GGUF file to write.", kind="file", template="that of the source")
def command(source: Path, kind: str, options: ArtifactOptions, **given: Any) -> None:
    """Quantize SOURCE, a checkpoint folder or an F16, BF16 or F32 GGUF, with llama.cpp's own quantizer."""
    output, force = options.output, options.force
    calibration, saved = given["calibration"], given["save_imatrix"]
    if saved and not calibration:
        raise InputError("--save-imatrix keeps what a calibration measures. Add --calibration PAIRS.jsonl.")
    inputs = [calibration, given["imatrix"], options.template]
    check_output(output, [source], force=force, file=True, inputs=inputs)
    plan_notices(output, source)  # what is in their way had better be told before a calibration
    if saved:
        sources = [source, output, output.with_name(f"{output.name}.json")]
        check_output(saved, sources, force=force, file=True, inputs=inputs)
    with open_source(source, beside=output, template=options.template) as opened:
        overrides = named_overrides(opened, given["overrides"], given["embedding_type"], given["output_type"])
        matrix = read_imatrix(given["imatrix"]) if given["imatrix"] else None
        if matrix:
            check_belongs(opened, matrix)
        same: dict[str, Any] = {"kind": kind, "imatrix": matrix, "overrides": overrides, "force": force}
        if calibration:
            need_packages("gptq", "torch", "transformers")
            how = {name: given[name] for name in ("tokens", "seed", "device", "mode")} | {"chat": options.chat}
            manifest = quantize_and_calibrate(
                source, opened, output, calibration=calibration, save_imatrix=saved, **same, **how
            )
        elif target_bits(kind):
            raise InputError("--type auto weighs types by what they do to verdicts. Add --calibration PAIRS.jsonl.")
        else:
            manifest = quantize_source(opened, output, **same)
        options.finish(manifest, partial(smoke_judge, source=opened.path))
