"""The data behind a GGUF's header: the bytes, their hash, and what happens where the disk has no room or no direct writing."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy
import pytest

from gramlite.formats import hashed_output as output
from gramlite.formats.hashed_output import BUFFER_BYTES, HashedOutput

PIECES = [
    b"",
    numpy.arange(7, dtype="<f2"),
    bytes(13),
    numpy.random.default_rng(0).integers(0, 256, (3, BUFFER_BYTES // 2), dtype=numpy.uint8),
    numpy.random.default_rng(1).standard_normal(BUFFER_BYTES).astype(numpy.float32),
    b"end",
]


def expected(header: bytes) -> bytes:
    data = header + b"".join(bytes(memoryview(piece).tobytes()) for piece in PIECES)
    return data + bytes(-len(data) % 32)


def write(path: Path, header: bytes) -> str:
    path.write_bytes(header)
    with HashedOutput(path) as data:
        for piece in PIECES:
            data.put(piece)
        data.pad(32)
        assert data.size == len(expected(header))
        return data.finish()


@pytest.mark.parametrize("header", [b"", b"header", bytes(2 * BUFFER_BYTES), bytes(BUFFER_BYTES + 5)])
def test_what_was_put_is_there_and_hashed(header: bytes, tmp_path: Path) -> None:
    digest = write(tmp_path / "file", header)
    assert (tmp_path / "file").read_bytes() == expected(header)
    assert digest == hashlib.sha256(expected(header)).hexdigest()


@pytest.mark.parametrize("refused", ["open", "write"])
def test_where_direct_writing_is_refused_it_goes_on_plainly(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not output.DIRECT:
        pytest.skip("this system has no O_DIRECT")
    plain_open, plain_write = os.open, os.write
    direct: set[int] = set()

    def open_file(path: str, flags: int, *more: int) -> int:
        if flags & output.DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "no direct writing here")
        descriptor = plain_open(path, flags & ~output.DIRECT, *more)
        if flags & output.DIRECT:
            direct.add(descriptor)
        return descriptor

    def write_to(descriptor: int, data: memoryview) -> int:
        if descriptor in direct:
            direct.discard(descriptor)
            raise OSError(errno.EINVAL, "badly aligned")
        return plain_write(descriptor, data)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "write", write_to)
    assert write(tmp_path / "file", b"header") == hashlib.sha256(expected(b"header")).hexdigest()
    assert (tmp_path / "file").read_bytes() == expected(b"header") and not direct


def test_a_write_that_fails_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", b"header")
