"""What a rounding takes away, given back as a LoRA adapter: W ~ Q + B A, with Q in any of llama.cpp's types.

The rounding error's leading singular directions are kept as a small adapter file that is always applied with the
quantized one (LQER, Zhang et al., 2402.02446). Rounding and adapter are found in turns, each for what the other leaves
(LoftQ, Li et al., 2310.08659): a checkpoint that is a tuned 4-bit model then falls apart into its base, rounded without
loss, and its tuning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gramlite.export.publish import MANIFEST_BYTES

from gramlite.artifact import Manifest
from gramlite.errors import InputError
from gramlite.gguf_header import COMPANION, Header, Tensor, read_header
from gramlite.reference_weights import dequantized
from gramlite.storage import atomic_output, sha256_file

from .ggml import Floats, dequantize_rows, quantize_rows, rounded
from .gguf import Refined, file_type, quantize_source
from .report import Progress, layer_bar
from .source import EXACT, Source

FACTOR_TYPE = "Q5_0"  # its rounding takes half a percent of what the adapter gives back
RANKS = 32  # a rank is a multiple of it, so that rows of B fill the factors' blocks
ROUNDS = 4
MOST = 0.8  # of the rounding error; an adapter that gives back less may do harm (docs/quantization.md)
LEAST_GAIN = 0.03  # of a matrix's error, for which another round is worth its time
SPARE_DIRECTIONS, POWER_STEPS = 16, 3
LAYER_MATRIX = re.compile(r"blk\.\d+\..*weight")


@dataclass(frozen=True)
class Split:
    """A matrix W [rows, columns] as `blocks` of its type plus B [rows, rank] A [rank, columns], as stored.

    `plain` and `error` are the squared errors of W, relative to its square, without and with the adapter.
    """

    blocks: np.ndarray[Any, np.dtype[np.uint8]]
    a: Floats
    b: Floats
    plain: float
    error: float


def quantize_low_rank(source: Source, destination: Path, *, rank: int, force: bool = False, **options: Any) -> Manifest:
    """Quantize an open source with an adapter of `rank` beside it, DESTINATION's name with `.low-rank.gguf` at its end.

    `options` are `quantize_source`'s. Raises InputError for a rank that is no multiple of 32 or a type that has
    nothing to give back, and what `quantize_source` raises.
    """
    if rank < RANKS or rank % RANKS:
        raise InputError(
            f"--low-rank {rank} is to be a multiple of {RANKS}, such as {max(1, round(rank / RANKS)) * RANKS}."
        )
    companion = destination.with_name(f"{destination.stem}.low-rank.gguf")
    need_bytes = MANIFEST_BYTES + sum(
        rank * sum(source_tensor.shape) * 6 // 8 for source_tensor in layer_matrices(source.header)
    )
    with layer_bar() as progress, atomic_output(companion, force=force, need_bytes=need_bytes) as adapter:

        def refine(file: Path) -> Refined:
            described = split_file(source.header, file, adapter, rank=rank, progress=progress)
            return Refined(
                settings={"low_rank": described},
                notes=() if described["given_back"] >= MOST else (_doubt(described["given_back"]),),
                files={companion.name: sha256_file(adapter)},
                companion_bytes=adapter.stat().st_size,
            )

        notes = ((COMPANION, companion.name),)
        name = f"{file_type(options['kind'])}+low-rank{rank}"
        return quantize_source(source, destination, force=force, refine=refine, notes=notes, name=name, **options)


def _doubt(given_back: float) -> str:
    return (
        f"the adapter gives back {given_back:.0%} of what rounding took, which need not bring the verdicts nearer: "
        "compare with the plain type, or try another, such as Q4_1"
    )


def split_file(source: Header, file: Path, adapter: Path, *, rank: int, progress: Progress) -> dict[str, Any]:
    """Replace the layers' matrices in a quantized file by what is best beside an adapter, and write the adapter.

    Returns the settings to record: rank, the factors' type, and the matrices' mean errors without and with it.
    """
    written = read_header(file)
    exact = {tensor.name: tensor for tensor in layer_matrices(source)}
    todo = [tensor for tensor in layer_matrices(written) if tensor.type not in EXACT]
    if not todo:
        raise InputError("--low-rank gives back what a rounding takes, and this --type rounds no layer. Leave it out.")
    if rank > (least := min(min(tensor.shape) for tensor in todo)):
        raise InputError(f"--low-rank {rank} is more than the {least} rows or columns of the smallest matrix.")
    errors: list[tuple[float, float]] = []
    factors: dict[str, Floats] = {}
    with file.open("r+b") as target:
        for number, tensor in enumerate(todo):
            progress("Splitting matrix", number, len(todo))
            found = split(dequantized(source, exact[tensor.name]), tensor.type, rank)
            target.seek(written.data_offset + tensor.offset)
            target.write(found.blocks.tobytes())
            factors |= {f"{tensor.name}.lora_a": found.a, f"{tensor.name}.lora_b": found.b}
            errors.append((found.plain, found.error))
    write_adapter(adapter, source.architecture, factors, rank)
    progress("Splitting matrix", len(todo), len(todo))
    plain, error = np.mean(errors, axis=0)
    return {
        "rank": rank,
        "factors": FACTOR_TYPE,
        "matrices": len(todo),
        "mean_error_without": float(plain),
        "mean_error": float(error),
        "given_back": 1 - float(error / plain) if plain else 0.0,
    }


def write_adapter(path: Path, architecture: str, factors: Mapping[str, Floats], rank: int) -> None:
    """A LoRA in GGUF form whose factors, float32 by tensor name, are stored in `FACTOR_TYPE`; its scale is 1."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, values in factors.items():
            blocks = quantize_rows(values, FACTOR_TYPE)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[FACTOR_TYPE])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def split(weight: Floats, kind: str, rank: int) -> Split:
    """The best of a few rounds of rounding what the adapter leaves, and of fitting the adapter to what that leaves.

    The rounding searches for the scales that lose least, as llama.cpp does where it has an importance matrix, here one
    of ones: scales taken from a block's extremes move with every change of the adapter, and the turns do not settle.
    """
    energy = float(np.square(weight).sum()) or 1.0
    evenly = np.ones(weight.shape[1], np.float32)
    best: Split | None = None
    given_back = np.zeros_like(weight)
    for _ in range(ROUNDS):
        blocks = quantize_rows(weight - given_back, kind, evenly)
        rest = weight - dequantize_rows(blocks, kind, weight.shape[1])
        b, a = leading_factors(rest, rank)
        a, b = rounded(a, FACTOR_TYPE), rounded(b, FACTOR_TYPE)
        given_back = b @ a
        error = float(np.square(rest - given_back).sum()) / energy
        plain = best.plain if best else float(np.square(rest).sum()) / energy
        gain = 1 - error / max(best.error, float(np.finfo(np.float32).tiny)) if best else 1.0
        if gain > 0:
            best = Split(blocks, a, b, plain, error)
        if gain < LEAST_GAIN:
            break
    assert best is not None
    return best


def leading_factors(matrix: Floats, rank: int) -> tuple[Floats, Floats]:
    """B [rows, rank] and A [rank, columns], alike in size, whose product is nearly the best of that rank.

    A randomized range finder with power steps: Halko, Martinsson and Tropp, 0909.4061, algorithms 4.4 and 5.1.
    """
    generator = np.random.default_rng(0)
    width = min(rank + SPARE_DIRECTIONS, *matrix.shape)
    basis = np.linalg.qr(matrix @ generator.standard_normal((matrix.shape[1], width), np.float32))[0]
    for _ in range(POWER_STEPS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    left, sizes, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = np.sqrt(sizes[:rank])
    return basis @ (left[:, :rank] * root), root[:, None] * right[:rank]


def layer_matrices(header: Header) -> list[Tensor]:
    """The matrices of the decoder's layers: the ones that llama.cpp applies an adapter to."""
    return [tensor for tensor in header.tensors if len(tensor.shape) == 2 and LAYER_MATRIX.fullmatch(tensor.name)]
