"""Safetensors files that fail as other files do, and that others may read as they may other files.

The library raises an exception of its own where the disk is full, and since 0.8 lets nobody but the owner read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def save_tensors(tensors: dict[str, Any], path: Path, *, metadata: dict[str, str]) -> None:
    """Write arrays of numpy, or tensors of torch, to a new file; raises OSError as every other write does."""
    import numpy

    save: Callable[..., None]
    if all(isinstance(tensor, numpy.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file as save
    else:
        from safetensors.torch import save_file as save
    path.touch()
    mode = path.stat().st_mode  # what the umask leaves, which cannot be asked without setting it
    with operating_system_errors():
        save(tensors, path, metadata=metadata)
    path.chmod(mode)


@contextmanager
def operating_system_errors() -> Iterator[None]:
    """Turn the library's exception into the OSError it stands for, by which a full disk is known."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code)) from error


def open_to_readers(folder: Path, model: Path) -> None:
    """Give a folder's safetensors files the permissions of the file `model`."""
    mode = model.stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
