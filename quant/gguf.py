"""A checkpoint or an exact GGUF -> GGUF in any of llama.cpp's types, by llama.cpp's own quantizer.

What comes out without an importance matrix is byte for byte what llama-quantize writes; with one, it is what
llama-quantize writes with the same matrix.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from gramlite.export.report import judge_command, print_artifact, print_notes
from gramlite.export.smoke import smoke_judge, smoke_option

from gramlite.errors import InputError, ModelError, ResourceError
from gramlite.formats.artifact import Manifest
from gramlite.formats.carried import plan_notices
from gramlite.formats.ggml_types import GGML_TYPES
from gramlite.formats.gguf_header import Header, read_header
from gramlite.formats.gguf_writer import HEADER_BYTES
from gramlite.formats.publish import publish_file, tool_versions
from gramlite.formats.quantization import bits_per_weight
from gramlite.options import chat_options
from gramlite.runtime.machine import thread_count
from gramlite.storage import check_output, sha256_file

from .calibration import DEFAULT_TOKENS, mode_option
from .ggml import FILE_TYPE_NUMBERS, TYPE_NUMBERS, Job, Outcome, QuantizerError, quantize_file
from .imatrix import ImportanceMatrix, matrix_sha256, read_imatrix, write_imatrix
from .memory import pick_device
from .mixed import target_bits
from .packages import need_packages
from .report import Progress, layer_bar
from .source import EXACT, Source, open_source

SHORT_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
NEEDS_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
NEARLY_NOTHING = 1 << 20  # bytes free on a disk that a write has just filled
TYPICAL_BITS = re.compile(r"(\d)")


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


def quantize_source(
    source: Source,
    destination: Path,
    *,
    kind: str,
    imatrix: ImportanceMatrix | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    force: bool = False,
    threads: int | None = None,
    calibration: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    name: str | None = None,
) -> Manifest:
    """What `quantize_gguf` does with a source that is open already.

    `calibration` is what is known of the transcripts; `settings` are added to the manifest's, and `name` is what the
    manifest calls the quantization where that is not the file's type.
    """
    destination = check_output(destination, [source.path], force=force, file=True)
    kind = file_type(kind)
    wanted = check_overrides(source, kind, overrides)
    check_matrix(source, kind, imatrix)
    matrix = imatrix.means() if imatrix else {}
    with layer_bar() as progress:

        def build(temporary: Path) -> Manifest:
            job = Job(
                source=str(source.path),
                output=str(temporary),
                kind=kind,
                overrides=wanted,
                threads=thread_count(threads),
                importance=tuple((name, len(values)) for name, values in matrix.items()),
            )
            outcome = _run(job, matrix, progress)
            written = read_header(temporary)
            return Manifest(
                format="gguf",
                name=destination.stem,
                quantization=name or kind,
                method="llama.cpp",
                source=source.described,
                settings={"type": kind, "overrides": [list(pair) for pair in wanted]}
                | describe_types(written, outcome)
                | (settings or {}),
                calibration=describe_matrix(imatrix, calibration) if imatrix else calibration,
                tools=tool_versions("llama-cpp-python", "gguf", "numpy"),
                template=source.template,
                bits_per_weight=round(bits_per_weight(written), 4),
                files={destination.name: sha256_file(temporary)},
            )

        return publish_file(destination, build, source.path, force=force, need_bytes=_room(source.header, kind))


def file_type(name: str) -> str:
    """llama.cpp's name of a file type, whatever its case; raises InputError that lists them for an unknown one."""
    known = SHORT_NAMES.get(name.upper(), name.upper())
    if known not in FILE_TYPE_NUMBERS:
        raise InputError(f"There is no type {name!r}. --type is one of {', '.join(FILE_TYPE_NUMBERS)}.")
    return known


def tensor_type(name: str) -> str:
    """ggml's name of a tensor type; raises InputError that lists them for an unknown one."""
    if name.upper() not in TYPE_NUMBERS or not GGML_TYPES[TYPE_NUMBERS[name.upper()]].weight:
        known = [kind.name for kind in GGML_TYPES.values() if kind.weight]
        raise InputError(f"A tensor cannot be of type {name!r}. There are {', '.join(known)}.")
    return name.upper()


def check_overrides(source: Source, kind: str, overrides: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The overrides with llama.cpp's names; raises InputError for one that cannot be, or would change nothing."""
    if overrides and kind in EXACT:
        raise InputError(f"llama.cpp knows no types for single tensors in a file of {kind}. Take a quantized --type.")
    for pattern, _ in overrides:
        try:
            fits = any(re.search(pattern, name) for name in source.matrices)
        except re.error as error:
            raise InputError(f"{pattern!r} is no regular expression ({error}).") from error
        if not fits:
            raise InputError(f"No matrix of {source.path.name} has a name with {pattern!r} in it, such as attn_v.")
    return tuple((pattern, tensor_type(name)) for pattern, name in overrides)


def named_overrides(
    source: Source, texts: Sequence[str], embedding: str | None, head: str | None
) -> list[tuple[str, str]]:
    """The command line's overrides, those of the embedding and the head first; a tied head is the embedding."""
    named = [(EMBEDDING, embedding), (HEAD if HEAD in source.matrices else EMBEDDING, head)]
    exact = [(f"^{re.escape(name)}$", kind) for name, kind in named if kind]
    return exact + [parse_override(text) for text in texts]


def check_matrix(source: Source, kind: str, imatrix: ImportanceMatrix | None) -> None:
    """Refuse a type that needs an importance matrix and has none, or a matrix of another model."""
    if imatrix is None:
        if kind in NEEDS_MATRIX:
            raise _matrix_needed(kind)
        return
    check_belongs(source, imatrix)


def check_belongs(source: Source, imatrix: ImportanceMatrix) -> None:
    """Refuse the importance matrix of another model, whose values native code would read past their end."""
    widths = {tensor.name: tensor.shape[0] for tensor in source.header.tensors}
    fitting = [name for name, values in imatrix.sums.items() if widths.get(name) == len(values)]
    if len(fitting) < len(imatrix.sums):
        other = next(name for name in imatrix.sums if name not in fitting)
        raise ModelError(
            f"The importance matrix belongs to another model: {other!r} has {len(imatrix.sums[other]):,} inputs there "
            f"and {widths.get(other, 'none')} here. Make one of this model with --calibration."
        )


def _matrix_needed(kind: str) -> InputError:
    return InputError(f"{kind} needs an importance matrix. Add --calibration PAIRS.jsonl, or --imatrix FILE.")


def describe_matrix(imatrix: ImportanceMatrix, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """What a manifest says of the importance matrix that was used, and of its transcripts where they are known."""
    source = {"source": ", ".join(imatrix.datasets), "transcripts": imatrix.chunks, "tokens": round(imatrix.tokens)}
    return source | (calibration or {}) | {"imatrix_sha256": matrix_sha256(imatrix)}


def describe_types(written: Header, outcome: Outcome) -> dict[str, Any]:
    """How many matrices have which type, and which of them were meant to have another."""
    types = Counter(tensor.type for tensor in written.tensors if len(tensor.shape) > 1)
    described: dict[str, Any] = {"types": dict(types.most_common())}
    if outcome.fallbacks:
        swaps = Counter((meant, taken) for _, meant, taken in outcome.fallbacks)
        listed = ", ".join(f"{count} {taken} instead of {meant}" for (meant, taken), count in swaps.most_common())
        described["fallbacks"] = {name: [meant, taken] for name, meant, taken in outcome.fallbacks}
        described["notes"] = [
            f"rows are no multiple of the type's blocks in {len(outcome.fallbacks)} matrices: {listed}"
        ]
    return described


def _run(job: Job, matrix: Any, progress: Progress) -> Outcome:
    try:
        return quantize_file(job, matrix, advance=lambda done, total: progress(f"Writing {job.kind}", done, total))
    except QuantizerError as error:
        if "imatrix" in error.words or "importance matrix" in error.words:
            raise _matrix_needed(job.kind) from error
        if shutil.disk_usage(Path(job.output).parent).free < NEARLY_NOTHING:
            raise ResourceError(
                f"The disk of {Path(job.output).parent} is full; nothing was written. "
                "Free some space, or choose another -o."
            ) from error
        raise


def _room(header: Header, kind: str) -> int:
    """Bytes the file should take, about: llama.cpp gives some matrices more bits than the type's name says."""
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors)
    bits = 32 if kind == "F32" else 16 if kind in EXACT else int(TYPICAL_BITS.search(kind)[1]) + 1.0  # type: ignore[index]
    return int(weights * bits / 8) + HEADER_BYTES


def parse_override(text: str) -> tuple[str, str]:
    """`attn_v=Q8_0` as a pattern and a type; raises InputError for anything else."""
    pattern, equals, kind = text.rpartition("=")
    if not pattern or not equals or not kind:
        raise InputError(f"--tensor-type {text} is not PATTERN=TYPE, such as attn_v=Q8_0.")
    return pattern, tensor_type(kind)


def no_low_rank(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Tell who asks for a companion what there is in its place."""
    if value is not None:
        raise InputError(
            "--low-rank was removed. Take --type Q4_K_M --calibration PAIRS.jsonl, or --type auto:4.5bpw with the same."
        )


@click.command("gguf", short_help="checkpoint or GGUF -> GGUF in any of llama.cpp's types")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file to write.")
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
@mode_option
@click.option("--tokens", type=int, default=DEFAULT_TOKENS, show_default=True, help="Budget of calibration tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the transcripts that fit the budget.")
@click.option("--device", default="auto", show_default=True, help="Where to calibrate: auto, cpu or cuda.")
@click.option("--template", metavar="NAME|FILE", help="The judge's template; by default that of the source.")
@chat_options
@smoke_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: Path, output: Path, kind: str, smoke: bool, as_json: bool, **options: Any) -> None:
    """Quantize SOURCE, a checkpoint folder or an F16, BF16 or F32 GGUF, with llama.cpp's own quantizer."""
    from .calibrated import calibrate, measure_importance, quantize_calibrated

    if options["save_imatrix"] and not options["calibration"]:
        raise InputError("--save-imatrix keeps what a calibration measures. Add --calibration PAIRS.jsonl.")
    inputs = [options[name] for name in ("calibration", "imatrix", "template")]
    check_output(output, [source], force=options["force"], file=True, inputs=inputs)
    plan_notices(output, source)  # what is in their way had better be told before a calibration
    if options["save_imatrix"]:
        sources = [source, output, output.with_name(f"{output.name}.json")]
        check_output(options["save_imatrix"], sources, force=options["force"], file=True, inputs=inputs)
    with open_source(source, beside=output, template=options["template"]) as opened:
        overrides = named_overrides(opened, options["overrides"], options["embedding_type"], options["output_type"])
        matrix = read_imatrix(options["imatrix"]) if options["imatrix"] else None
        if matrix:
            check_belongs(opened, matrix)
        if options["calibration"]:
            need_packages("gptq", "torch", "transformers")
            device = pick_device(options["device"])
            sizes = {name: options[name] for name in ("chat", "tokens", "seed", "device", "mode")}
            transcripts, described = calibrate(source, opened, options["calibration"], **sizes)
            name = options["calibration"].name
            matrix = matrix or measure_importance(source, opened, transcripts, name, device=device)
            if options["save_imatrix"]:
                write_imatrix(options["save_imatrix"], matrix, force=options["force"])
            manifest = quantize_calibrated(
                source,
                opened,
                output,
                transcripts,
                kind=kind,
                imatrix=matrix,
                overrides=overrides,
                calibration=described,
                device=device,
                force=options["force"],
            )
        elif target_bits(kind):
            raise InputError("--type auto weighs types by what they do to verdicts. Add --calibration PAIRS.jsonl.")
        else:
            manifest = quantize_source(
                opened, output, kind=kind, imatrix=matrix, overrides=overrides, force=options["force"]
            )
        if smoke:
            judging = {name: options[name] for name in ("template", "chat", "force")}
            manifest = smoke_judge(output, manifest, opened.path, **judging)
    print_notes(manifest)
    print_artifact(output, manifest, command=judge_command(output, manifest), as_json=as_json)
