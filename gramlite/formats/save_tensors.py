"""The one writer of safetensors files, and how files that libraries write become like it.

Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the data). By hand, because numpy has
no bfloat16, and because the library raises an exception of its own where the disk is full and since 0.8 lets nobody but
the owner read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

DTYPES = {"<f4": "F32", "<i4": "I32", "<u2": "BF16", "<f2": "F16"}  # in the order in which the library writes them


def save_tensors(tensors: Mapping[str, NDArray[Any]], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write arrays to a new file, byte for byte as the library would; those of uint16 are bfloat16's bits."""
    order = list(DTYPES.values())
    entries = [(name, DTYPES[array.dtype.newbyteorder("<").str], array) for name, array in tensors.items()]
    entries.sort(key=lambda entry: (order.index(entry[1]), entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, array in entries:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, _, array in entries:
            file.write(numpy.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)


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
