"""Conversions between dtypes, against torch, and the rope permutation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
import pytest

from gramlite.formats.checkpoint import StoredTensor
from gramlite.formats.tensor_stream import (
    PIECE_BYTES,
    SourceHash,
    convert,
    is_finite,
    permute_heads,
    read_pieces,
)
from gramlite.storage import sha256_cached

ALL_BFLOAT16 = numpy.arange(1 << 16, dtype=numpy.uint16)
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def values(source: str) -> Any:
    """Every bfloat16, every float16, or float32 values that lie between them, ties included."""
    if source in ("BF16", "F16"):
        return ALL_BFLOAT16
    random = numpy.random.default_rng(3).integers(0, 1 << 32, 200_000, dtype=numpy.uint32)
    ties = numpy.array(
        [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x00008000, 0x7F7F8000, 0x33800000, 0x477FF000], numpy.uint32
    )
    return numpy.concatenate([ALL_BFLOAT16.astype(numpy.uint32) << 16, random, ties])


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_conversions_are_those_of_torch(source: str, target: str) -> None:
    torch = pytest.importorskip("torch")
    bits = values(source)
    signed = torch.from_numpy(bits.view(numpy.int32 if source == "F32" else numpy.int16).copy())
    original = signed.view(getattr(torch, TORCH_NAMES[source]))
    keep = torch.isfinite(original)
    wanted = original[keep].to(getattr(torch, TORCH_NAMES[target]))
    found = convert(bits[keep.numpy()].tobytes(), source, target)
    assert found.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_infinite_values_are_noticed(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = {"F32": numpy.uint32, "F16": numpy.uint16, "BF16": numpy.uint16}[dtype]
    for value in (1.0, -3e4, 0.0, -0.0):
        for bad in (None, float("inf"), float("-inf"), float("nan")):
            tensor = torch.full((9,), value)
            if bad is not None:
                tensor[4] = bad
            raw = tensor.to(getattr(torch, TORCH_NAMES[dtype])).view(torch.uint8).numpy().copy().view(kind)
            assert is_finite(raw, dtype) is (bad is None)


def test_permutation_interleaves_the_halves_of_each_head() -> None:
    rows = numpy.arange(12, dtype=numpy.float32)[:, None] * numpy.ones(3, dtype=numpy.float32)
    assert permute_heads(rows, 2, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert permute_heads(numpy.arange(4), 1, 4).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("shape", "heads"), [((7, 5000), 0), ((300, 20_000), 0), ((64, 40_000), 4), ((13,), 0), ((0, 4), 0)]
)
def test_pieces_are_whole_rows_or_heads_in_order(shape: tuple[int, ...], heads: int, tmp_path: Path) -> None:
    size = 2 * int(numpy.prod(shape))
    data = numpy.random.default_rng(0).integers(0, 256, size, dtype=numpy.uint8).tobytes()
    (tmp_path / "w").write_bytes(b"before" + data + b"after")
    tensor = StoredTensor("w", "BF16", shape, tmp_path / "w", 6, size)
    with (tmp_path / "w").open("rb") as file:
        pieces = list(read_pieces(file, tensor, heads=heads))
    unit = size // heads if heads else size // max(shape[0], 1)
    assert b"".join(pieces) == data
    assert all(len(piece) % unit == 0 and len(piece) <= max(PIECE_BYTES, unit) for piece in pieces)


def test_a_source_is_hashed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"

    def read(wanted: bytes) -> str:
        source = SourceHash(file)
        source.update(wanted[:1])
        assert list(source.over([wanted[1:3], wanted[3:]])) == [wanted[1:3], wanted[3:]]
        return source.hexdigest()

    file.write_bytes(b"abcdef")
    first = hashlib.sha256(b"abcdef").hexdigest()
    assert read(b"abcdef") == first == sha256_cached(file)
    assert read(b"------") == first, "remembered: nothing was computed"
    file.write_bytes(b"another")
    assert read(b"another") == hashlib.sha256(b"another").hexdigest()


def test_a_hash_that_cannot_be_kept_is_computed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"abc")
    for _ in range(2):
        source = SourceHash(tmp_path / "weights")
        source.update(b"abc")
        assert source.hexdigest() == hashlib.sha256(b"abc").hexdigest()
