"""Safetensors files: a full disk is the OSError it is, and the umask says who may read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from gramlite.errors import ResourceError
from gramlite.formats.save_tensors import operating_system_errors, save_tensors
from gramlite.storage import atomic_output

TENSORS = {"weight": np.zeros((64, 64), np.float16)}


def test_a_full_disk_that_a_library_meets_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    def full(tensors: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ResourceError, match="is full; judge was not written"):
        with atomic_output(tmp_path / "judge") as folder:
            folder.mkdir()
            with operating_system_errors():
                full(TENSORS, folder / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_writing_fails_as_the_system_does(tmp_path: Path) -> None:
    """With a limit on a file's size in place of a full disk."""
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from gramlite.formats.save_tensors import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_tensors({"weight": np.zeros((64, 64), np.float16)}, Path(sys.argv[1]), metadata={})
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True)
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_says_who_may_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}])
def test_the_bytes_are_the_librarys(tmp_path: Path, metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    tensors = {
        "b.scales": random.random((3, 5)).astype(np.float16),
        "a.codes": random.integers(0, 9, (4, 3)).astype(np.int32),
        "norm": random.random(2).astype(np.float32),
        "empty \u00e9": np.zeros((0, 4), np.float16),
    }
    save_file(tensors, tmp_path / "library", metadata=metadata or None)
    save_tensors(tensors, tmp_path / "ours", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
