"""One GGUF file in one of llama.cpp's types, by llama.cpp's own quantizer.

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

from gramlite.errors import InputError, ModelError, ResourceError
from gramlite.formats.artifact import Manifest
from gramlite.formats.gguf_header import Header, read_header
from gramlite.formats.gguf_writer import HEADER_BYTES
from gramlite.formats.publish import publish_file, tool_versions
from gramlite.formats.quantization import bits_per_weight
from gramlite.runtime.machine import thread_count
from gramlite.storage import check_output, sha256_file

from .ggml import Job, Outcome, QuantizerError, quantize_file
from .imatrix import ImportanceMatrix, matrix_sha256
from .report import Progress, layer_bar
from .source import EXACT, ExactModel
from .tensor_types import check_overrides, file_type

NEEDS_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S")
NEARLY_NOTHING = 1 << 20  # bytes free on a disk that a write has just filled
TYPICAL_BITS = re.compile(r"(\d)")


def quantize_source(
    source: ExactModel,
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


def check_matrix(source: ExactModel, kind: str, imatrix: ImportanceMatrix | None) -> None:
    """Refuse a type that needs an importance matrix and has none, or a matrix of another model."""
    if imatrix is None:
        if kind in NEEDS_MATRIX:
            raise _matrix_needed(kind)
        return
    check_belongs(source, imatrix)


def check_belongs(source: ExactModel, imatrix: ImportanceMatrix) -> None:
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
