"""A Hugging Face checkpoint folder: its config, and where each tensor's bytes lie in its safetensors files.

Nothing is loaded here. Headers are read with bounds and every extent is checked against the file, so that what follows
can stream. Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the data without holes).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gramlite.errors import InputError, ModelError

from .artifact import PICKLE_SUFFIXES
from .model_folder import read_json_object

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: `start` is its offset in the file and `bytes` its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: config.json's content, its tensors by name, and its safetensors files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]

    @property
    def weights(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and the headers of every safetensors file of a checkpoint.

    Raises InputError where there is no such folder, and ModelError, which names the file or tensor, for a pickle
    checkpoint, a missing shard, a damaged or truncated file, or a tensor that lies in two files.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = tuple(weight_files(folder))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_safetensors_header(file).items():
            if name in tensors:
                raise ModelError(
                    f"The tensor {name!r} lies in {tensors[name].file.name} and in {file.name}. Keep one of them."
                )
            tensors[name] = tensor
    check_index(folder, tensors)
    return Checkpoint(folder, config, tensors, files)


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json; refuses a folder that has none, or whose weights are quantized already."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. Name the checkpoint's folder, the one with config.json in it.")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, so it is no checkpoint. Name the folder of the checkpoint itself."
        )
    config = read_json_object(folder / "config.json")
    if config.get("quantization_config"):
        raise ModelError(
            f"{folder} is quantized already (config.json has quantization_config). Name the full-precision checkpoint."
        )
    return config


def weight_files(folder: Path) -> Iterable[Path]:
    """The checkpoint's safetensors files: those its index names, else the one file, else every one there is."""
    if (folder / INDEX).is_file():
        names = sorted(set(index_map(folder).values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{folder / INDEX} names {name!r}, which is no safetensors file of this folder.")
            if not (folder / name).is_file():
                raise ModelError(f"The shard {folder / name} is missing; {INDEX} lists it. Download it again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        return complete_shards(shards)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read and is refused. "
            "Save the checkpoint as safetensors (save_pretrained does) and name that folder."
        )
    raise ModelError(f"{folder} has no model.safetensors and no {INDEX}. Download the weights as safetensors.")


def complete_shards(shards: list[Path]) -> list[Path]:
    """Shards without an index, refused unless each of 1 to N is there."""
    total = shards[0].stem.rpartition("-of-")[2]
    if not total.isdigit() or int(total) > 100_000:
        raise ModelError(
            f"{shards[0]} has no usable number of shards in its name, and there is no {INDEX}. Download the index."
        )
    for number in range(1, int(total) + 1):
        expected = shards[0].with_name(f"model-{number:0{len(total)}d}-of-{total}.safetensors")
        if expected not in shards:
            raise ModelError(f"The shard {expected} is missing. Download it again.")
    return shards


def index_map(folder: Path) -> dict[str, str]:
    mapping = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise ModelError(f"{folder / INDEX} has no usable weight_map. Download it again.")
    return mapping


def check_index(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuse a shard that lacks a tensor which the index places in it."""
    if not (folder / INDEX).is_file():
        return
    for name, file in index_map(folder).items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(
                f"The tensor {name!r} is missing from {folder / file}, where {INDEX} places it. Download both again."
            )


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their data.

    Raises ModelError, which names the file and the fault: a header that is cut short, too long or malformed, an extent
    that does not fit its shape, data that overlap, leave a hole, or end before the file does or after it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise damaged(path, "its header's length is unusable, so it is no safetensors file or is cut short")
            if 8 + length > size:
                raise damaged(path, f"it is cut short: the header needs {8 + length:,} bytes and the file has {size:,}")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = [_stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise damaged(path, f"the tensor {tensor.name!r} starts at {tensor.start:,} where {position:,} is due")
        position += tensor.bytes
    if position != size:
        what = "it is cut short" if size < position else "it has bytes that belong to no tensor"
        raise damaged(path, f"{what}: the header speaks of {position:,} bytes and the file has {size:,}")
    return {tensor.name: tensor for tensor in tensors}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise damaged(path, f"the tensor {name!r} has the unknown dtype {dtype!r}")
    if not _counts(shape) or len(shape) > 8:
        raise damaged(path, f"the tensor {name!r} has the unusable shape {shape!r}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"the tensor {name!r} has unusable data_offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise damaged(
            path, f"the tensor {name!r} has {offsets[1] - offsets[0]:,} bytes, which do not fit {dtype} {shape}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_start + offsets[0], offsets[1] - offsets[0])


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 60 for item in value)


def damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is refused: {what}. Download it again.")
