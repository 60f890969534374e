"""Tensors in pieces: read from a safetensors file, converted, permuted for rope, hashed on the way.

Only a few pieces of about a MiB are in memory at a time, whatever the tensor's size; reading with `read` instead of a
memory map keeps the process's resident memory at that.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

from gramlite.errors import ModelError
from gramlite.storage import file_identity, remember_sha256, remembered_sha256

from .checkpoint import StoredTensor, damaged

PIECE_BYTES = 1 << 20  # larger ones give their memory back and fault it in again each time
NUMPY_TYPES: dict[str, numpy.dtype[Any]] = {
    "F32": numpy.dtype("<f4"),
    "F16": numpy.dtype("<f2"),
    "BF16": numpy.dtype("<u2"),
}
# infinity's bits as a signed integer, and minus infinity's as an unsigned one: what is as large in either is no number
INFINITE: dict[str, tuple[tuple[numpy.dtype[Any], int], tuple[numpy.dtype[Any], int]]] = {
    "F32": ((numpy.dtype("<i4"), 0x7F800000), (numpy.dtype("<u4"), 0xFF800000)),
    "F16": ((numpy.dtype("<i2"), 0x7C00), (numpy.dtype("<u2"), 0xFC00)),
    "BF16": ((numpy.dtype("<i2"), 0x7F80), (numpy.dtype("<u2"), 0xFF80)),
}


class SourceHash:
    """The sha256 of a file that is read from its beginning to its end, piece by piece, and is remembered for later.

    Where it is remembered already, and the file has not changed since, nothing is computed.
    """

    def __init__(self, file: Path) -> None:
        self._identity = file_identity(file)
        self._known = remembered_sha256(self._identity)
        self._digest = hashlib.sha256()

    def update(self, piece: bytes) -> None:
        if self._known is None:
            self._digest.update(piece)

    def over(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, each hashed by whoever asks for it."""
        for piece in pieces:
            self.update(piece)
            yield piece

    def hexdigest(self) -> str:
        if self._known is None:
            self._known = self._digest.hexdigest()
            remember_sha256(self._identity, self._known)
        return self._known


def read_bytes(tensor: StoredTensor) -> bytes:
    """All of a tensor's bytes; raises ModelError where its file ends before."""
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.bytes)
    if len(data) != tensor.bytes:
        raise damaged(tensor.file, f"it ended while the tensor {tensor.name!r} was read")
    return data


def read_float(tensor: StoredTensor) -> NDArray[numpy.float32]:
    """A tensor as float32, exactly, in its own shape; raises ModelError for a value that is no number."""
    return convert_checked(read_bytes(tensor), tensor, "F32").reshape(tensor.shape)


def read_pieces(file: BinaryIO, tensor: StoredTensor, *, heads: int = 0) -> Iterator[bytes]:
    """A tensor's bytes from its file in order, each piece a whole number of rows (of whole heads where permuted)."""
    file.seek(tensor.start)
    unit = (
        tensor.bytes // heads if heads else tensor.bytes // tensor.shape[0] if tensor.shape and tensor.shape[0] else 1
    )
    piece = max(1, PIECE_BYTES // max(unit, 1)) * unit
    left = tensor.bytes
    while left:
        data = file.read(min(piece, left))
        if len(data) != min(piece, left):
            raise damaged(tensor.file, f"it ended while the tensor {tensor.name!r} was read")
        left -= len(data)
        yield data


def read_ahead(pieces: Iterator[bytes], executor: ThreadPoolExecutor, *, depth: int = 4) -> Iterator[bytes]:
    """The same pieces, the next few read by the executor's one thread while the caller writes."""
    pending = deque(executor.submit(next, pieces, None) for _ in range(depth))
    while (piece := pending.popleft().result()) is not None:
        pending.append(executor.submit(next, pieces, None))
        yield piece


def convert(data: bytes, source: str, target: str) -> NDArray[Any]:
    """Values of dtype `source` as `target` (both F32, F16 or BF16), one-dimensional; bfloat16 as its 16 bits.

    Widening is exact; narrowing rounds to nearest, ties to even. What the target cannot hold becomes infinite.
    """
    values = numpy.frombuffer(data, dtype=NUMPY_TYPES[source])
    if source == target:
        return values
    if (source, target) == ("BF16", "F16"):
        return bfloat16_to_half(values)
    return encode(widen(values) if source == "BF16" else values.astype(numpy.float32, copy=False), target)


def encode(values: NDArray[numpy.float32], kind: str) -> NDArray[Any]:
    """Float32 values in the ggml type named `kind`: F32, F16, BF16 as its 16 bits, or a type of blocks."""
    if kind == "F32":
        return values
    if kind == "BF16":
        return narrow(values)
    if kind == "F16":
        return to_half(values)
    import gguf

    blocks: NDArray[Any] = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    return blocks


def to_half(values: NDArray[numpy.float32]) -> NDArray[Any]:
    with numpy.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(NUMPY_TYPES["F16"])


def bfloat16_to_half(bits: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 bits as float16.

    Where float16 has a normal number of the same size this is exact: the exponent is counted from 15 instead of 127,
    and the mantissa's seven bits become the upper seven of ten. The others, few in real weights, are looked up.
    """
    halves = bits * numpy.uint16(8)  # a shift, for which numpy has no vector instructions
    halves -= numpy.uint16(112 << 10 & 0xFFFF)  # the upper bits of exponents run out of the word on the left
    halves &= numpy.uint16(0x7FFF)
    halves |= bits & numpy.uint16(0x8000)
    doubled = bits + bits  # without the sign
    doubled -= numpy.uint16(113 << 8)
    others = numpy.flatnonzero(doubled >= numpy.uint16(30 << 8))
    halves[others] = half_of_bfloat16().view(numpy.uint16).take(bits[others])
    return halves.view(NUMPY_TYPES["F16"])


@functools.cache
def half_of_bfloat16() -> NDArray[Any]:
    """The float16 of each of the 65,536 bfloat16 values."""
    return to_half(widen(numpy.arange(1 << 16, dtype=numpy.uint16)))


def widen(bits: NDArray[Any]) -> NDArray[numpy.float32]:
    """bfloat16 bits as float32, exactly: they are its upper half."""
    values: NDArray[numpy.float32] = numpy.left_shift(bits, 16, dtype=numpy.uint32).view(numpy.float32)
    return values


def narrow(values: NDArray[numpy.float32]) -> NDArray[numpy.uint16]:
    """Finite float32 values as bfloat16 bits, rounded to nearest, ties to even."""
    bits = values.view(numpy.uint32)
    rounded = numpy.right_shift(bits, 16) & numpy.uint32(1)
    rounded += numpy.uint32(0x7FFF)
    rounded += bits
    rounded >>= numpy.uint32(16)
    return rounded.astype(numpy.uint16)


def is_finite(values: NDArray[Any], dtype: str) -> bool:
    """Whether none of the values is infinite or no number."""
    return not values.size or all(int(values.view(bits).max()) < limit for bits, limit in INFINITE[dtype])


def permute_heads(values: NDArray[Any], heads: int, head_size: int) -> NDArray[Any]:
    """Reorder the rows of whole heads from the half-split rope layout to llama.cpp's interleaved one.

    Within each head the rows 0, 1, …, d/2-1, d/2, … become 0, d/2, 1, d/2+1, …
    """
    grouped = values.reshape(heads, 2, head_size // 2, -1)
    return numpy.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(values.shape)


def unpermute_heads(values: NDArray[Any], heads: int, head_size: int) -> NDArray[Any]:
    """Undo `permute_heads`."""
    grouped = values.reshape(heads, head_size // 2, 2, -1)
    return numpy.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(values.shape)


def convert_checked(data: bytes, tensor: StoredTensor, target: str) -> NDArray[Any]:
    """Convert a piece of a tensor; ModelError where it holds what is no number, or what the target cannot hold."""
    source = numpy.frombuffer(data, dtype=NUMPY_TYPES[tensor.dtype])
    values = convert(data, tensor.dtype, target)
    # narrowing to bfloat16 may carry what is no number over into a zero; elsewhere it shows in the result
    carried = target == "BF16" and tensor.dtype != "BF16" and not is_finite(source, tensor.dtype)
    if is_finite(values, target) and not carried:
        return values
    if not is_finite(source, tensor.dtype):
        raise ModelError(
            f"The tensor {tensor.name!r} of {tensor.file} holds infinite values or values that are no number. Download it again."
        )
    wider = "--dtype bf16 or --dtype f32" if target == "F16" else "--dtype f32"
    raise ModelError(f"The tensor {tensor.name!r} has values that {target} cannot hold. Export with {wider}.")
