"""The binary layout of a GGUF file, read with bounds: nothing in it is believed before it is checked.

Native code and the `gguf` package trust counts and lengths that a hostile file chooses, so this parser runs
first. It reads the header only, never the weights, and stops at limits far above any real model. Refusals are
ModelError and name the field. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2
and 3, little-endian; where llama.cpp is stricter than that page, so is this file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
from numpy.typing import NDArray

from gramlite.errors import ModelError

from .ggml_types import GGML_TYPES

MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ITEMS = 1 << 24
MAX_ARRAY_STRINGS = 1 << 20  # of all arrays together; Llama 3 has 409,000, tokens and merges
MAX_TENSOR_NAME_BYTES = 63  # the specification says 64, llama.cpp keeps one for the closing NUL
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

Value = int | float | bool | str | tuple[str, ...] | NDArray[numpy.generic]


SCALARS = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
STRING, ARRAY = 8, 9
U32, U64 = SCALARS[4][1], SCALARS[10][1]

FOREIGN_STARTS = (
    (b"PK\x03\x04", "a ZIP archive, as PyTorch's pickle checkpoints are"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"version https://git-lfs", "a Git LFS pointer: the model itself was not downloaded"),
    (b"<", "a web page or XML, not a download of the model"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor: `shape` with the row length first; `offset`, from the start of the data, and `bytes`."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """Everything a GGUF file says before its weights.

    `metadata` maps each key to a scalar, a string, a tuple of strings or a numpy array; `types` maps the same
    keys to the type as written ("uint32", "string", "array[int32]"). Offsets and sizes are in bytes.
    """

    path: Path
    version: int
    metadata: dict[str, Value]
    types: dict[str, str]
    tensors: tuple[Tensor, ...]
    data_offset: int
    alignment: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def refusal(self, what: str) -> ModelError:
        """The ModelError that refuses this file; `what` names the field and what is wrong with it."""
        return _refusal(self.path, what)


def _refusal(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is refused: {what}. Download or export it again.")


def shown(value: object) -> str:
    """A value from the file as it may appear in a message: quoted, control characters escaped, not long."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass
class _Reader:
    """A file with a position; every read is checked against the end of the file and the header's limit."""

    path: Path
    file: BinaryIO
    file_bytes: int
    position: int = 0
    array_strings: int = 0

    def refusal(self, what: str) -> ModelError:
        return _refusal(self.path, what)

    @property
    def ceiling(self) -> int:
        return min(self.file_bytes, MAX_HEADER_BYTES)

    def take(self, count: int, what: str) -> bytes:
        if self.position + count > self.ceiling:
            if self.position + count > self.file_bytes:
                raise self.refusal(f"{what} runs past the end of the file ({self.file_bytes:,} bytes)")
            raise self.refusal(f"{what} lies beyond {MAX_HEADER_BYTES:,} bytes, the most a header may take")
        data = self.file.read(count)
        if len(data) != count:
            raise self.refusal(f"{what} ends early: the file shrank while it was read")
        self.position += count
        return data

    def u32(self, what: str) -> int:
        return int(U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(U64.unpack(self.take(8, what))[0])

    def string(self, what: str, limit: int) -> str:
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise self.refusal(f"{what} is {length:,} bytes long; at most {limit:,} are allowed")
        data = self.take(length, what)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.refusal(f"{what} is not valid UTF-8") from None
        if "\0" in text:
            raise self.refusal(f"{what} contains a NUL character")
        return text

    def name(self, what: str, limit: int) -> str:
        text = self.string(what, limit)
        if not text:
            raise self.refusal(f"{what} is empty")
        if not (text.isascii() and text.isprintable()):
            raise self.refusal(f"{what} {shown(text)} has characters other than printable ASCII")
        return text

    def strings(self, count: int, what: str) -> tuple[str, ...]:
        """An array of strings. The loop works on local names: vocabularies have hundreds of thousands."""
        self.array_strings += count
        if self.array_strings > MAX_ARRAY_STRINGS:
            raise self.refusal(f"{what} brings the strings in arrays above {MAX_ARRAY_STRINGS:,}")
        read, unpack, ceiling, position = self.file.read, U64.unpack, self.ceiling, self.position
        raw: list[bytes] = []
        append = raw.append
        for _ in range(count):
            prefix = read(8)
            if len(prefix) != 8:
                raise self.refusal(f"{what}[{len(raw)}] runs past the end of the file")
            length: int = unpack(prefix)[0]
            position += 8 + length
            if position > ceiling or length > MAX_STRING_BYTES:
                raise self.refusal(f"{what}[{len(raw)}] is {length:,} bytes long, more than the header can hold")
            append(read(length))
        self.position = position
        try:
            decoded = tuple([str(item, "utf-8") for item in raw])
        except UnicodeDecodeError:
            raise self.refusal(f"{what}[{_first_invalid(raw)}] is not valid UTF-8") from None
        if b"\0" in b"".join(raw):
            raise self.refusal(f"{what} has a string with a NUL character")
        return decoded


def _first_invalid(raw: list[bytes]) -> int:
    for index, item in enumerate(raw):
        try:
            item.decode("utf-8")
        except UnicodeDecodeError:
            return index
    raise AssertionError("called for strings of which one is invalid")


def parse_header(path: Path) -> Header:
    """Read a GGUF file's header and check its layout, not yet what it says of the model.

    Raises ModelError, which names the field, for anything that is no whole and well-formed GGUF file.
    """
    path = Path(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path} is a folder. Name the .gguf file itself.")
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file. Name a .gguf file.")
        with path.open("rb", buffering=1 << 20) as file:
            return _parse(_Reader(path, file, os.fstat(file.fileno()).st_size))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist. Check the path of the model.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Check its permissions and the disk.") from error


def _parse(reader: _Reader) -> Header:
    version = _read_version(reader)
    tensor_count = _read_count(reader, "the tensor count", MAX_TENSORS, 33)
    key_count = _read_count(reader, "the metadata key count", MAX_KEYS, 14)
    metadata: dict[str, Value] = {}
    types: dict[str, str] = {}
    for index in range(key_count):
        key = reader.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise reader.refusal(f"the metadata key {shown(key)} appears twice")
        types[key], metadata[key] = _read_value(reader, shown(key))
    alignment = _check_alignment(reader, metadata, types)
    tensors: dict[str, Tensor] = {}
    for index in range(tensor_count):
        tensor = _read_tensor(reader, index)
        if tensor.name in tensors:
            raise reader.refusal(f"the tensor name {shown(tensor.name)} appears twice")
        tensors[tensor.name] = tensor
    data_offset = _padded(reader.position, alignment)
    _check_extents(reader, tuple(tensors.values()), data_offset, alignment)
    return Header(
        path=reader.path,
        version=version,
        metadata=metadata,
        types=types,
        tensors=tuple(tensors.values()),
        data_offset=data_offset,
        alignment=alignment,
        file_bytes=reader.file_bytes,
    )


def _read_version(reader: _Reader) -> int:
    start = reader.file.read(min(32, reader.file_bytes))
    reader.file.seek(0)
    if start[:4] != b"GGUF":
        kind = next((kind for known, kind in FOREIGN_STARTS if start.startswith(known)), None)
        if kind is None and start[8:10] == b'{"':
            kind = "a safetensors file: export its checkpoint folder to GGUF first"
        found = f"it is {kind}" if kind else f"it starts with {shown(start[:4])}"
        raise reader.refusal(f"the magic is not GGUF; {found}")
    if len(start) < 24:
        raise reader.refusal(f"the file is too short for a GGUF header ({reader.file_bytes} bytes)")
    reader.take(4, "the magic")
    version = reader.u32("the version")
    if version and version & 0xFFFF == 0:
        raise reader.refusal("the version is stored in big-endian order; only little-endian GGUF is read")
    if version not in (2, 3):
        raise reader.refusal(f"the version is {version}; only GGUF versions 2 and 3 are read")
    return version


def _read_count(reader: _Reader, what: str, limit: int, least_bytes: int) -> int:
    """A count of entries that take at least `least_bytes` each in what remains of the file."""
    count = reader.u64(what)
    if count > limit:
        raise reader.refusal(f"{what} is {count:,}; at most {limit:,} are allowed")
    if count * least_bytes > reader.file_bytes - reader.position:
        raise reader.refusal(f"{what} is {count:,}, more than the rest of the file can hold")
    return count


def _read_value(reader: _Reader, key: str) -> tuple[str, Value]:
    code = reader.u32(f"the type of {key}")
    if code == STRING:
        return "string", reader.string(key, MAX_STRING_BYTES)
    if code == ARRAY:
        return _read_array(reader, key)
    if code not in SCALARS:
        raise reader.refusal(f"{key} has the unknown value type {code}")
    name, layout = SCALARS[code]
    value = layout.unpack(reader.take(layout.size, key))[0]
    if name == "bool":
        if value > 1:
            raise reader.refusal(f"{key} is a bool with the value {value}, neither 0 nor 1")
        return name, bool(value)
    return name, value


def _read_array(reader: _Reader, key: str) -> tuple[str, Value]:
    code = reader.u32(f"the item type of {key}")
    if code == ARRAY:
        raise reader.refusal(f"{key} is an array of arrays, which llama.cpp does not read")
    if code != STRING and code not in SCALARS:
        raise reader.refusal(f"{key} is an array of the unknown value type {code}")
    item_bytes = 8 if code == STRING else SCALARS[code][1].size
    count = reader.u64(f"the length of {key}")
    if count > MAX_ARRAY_ITEMS:
        raise reader.refusal(f"{key} is an array of {count:,} items; at most {MAX_ARRAY_ITEMS:,} are allowed")
    if count * item_bytes > reader.file_bytes - reader.position:
        raise reader.refusal(f"{key} is an array of {count:,} items, more than the rest of the file can hold")
    if code == STRING:
        return "array[string]", reader.strings(count, key)
    name, layout = SCALARS[code]
    items = numpy.frombuffer(reader.take(count * item_bytes, key), dtype=numpy.dtype(layout.format))
    if name == "bool" and count and int(items.max()) > 1:
        raise reader.refusal(f"{key} is an array of bools with a value that is neither 0 nor 1")
    return f"array[{name}]", items


def _check_alignment(reader: _Reader, metadata: dict[str, Value], types: dict[str, str]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    alignment = metadata[key]
    if types[key] != "uint32" or not isinstance(alignment, int):
        raise reader.refusal(f"'{key}' is of type {types[key]}; it must be uint32")
    if alignment == 0 or alignment & (alignment - 1):
        raise reader.refusal(f"'{key}' is {alignment}, which is not a power of two")
    if not DEFAULT_ALIGNMENT <= alignment <= MAX_ALIGNMENT:
        # below 32, llama.cpp aborts the process when it maps the weights
        raise reader.refusal(f"'{key}' is {alignment}; it must be {DEFAULT_ALIGNMENT} to {MAX_ALIGNMENT:,}")
    return alignment


def _read_tensor(reader: _Reader, index: int) -> Tensor:
    name = reader.name(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {shown(name)}"
    dimensions = reader.u32(f"the dimension count of {what}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise reader.refusal(f"{what} has {dimensions} dimensions; it must have 1 to {MAX_DIMENSIONS}")
    shape = tuple(reader.u64(f"the shape of {what}") for _ in range(dimensions))
    code = reader.u32(f"the type of {what}")
    offset = reader.u64(f"the offset of {what}")
    if 0 in shape:
        raise reader.refusal(f"{what} has the shape {list(shape)}, with a dimension of zero")
    if math.prod(shape) >= 1 << 63:
        raise reader.refusal(f"{what} has the shape {list(shape)}, which overflows 64 bits")
    if code not in GGML_TYPES:
        raise reader.refusal(f"{what} has the unknown ggml type {code}")
    kind = GGML_TYPES[code]
    if shape[0] % kind.block:
        raise reader.refusal(f"{what} has rows of {shape[0]:,}, no multiple of {kind.name}'s {kind.block}")
    return Tensor(name, shape, kind.name, offset, math.prod(shape) // kind.block * kind.block_bytes)


def _check_extents(reader: _Reader, tensors: tuple[Tensor, ...], data_offset: int, alignment: int) -> None:
    """Each tensor must start where the one before it ends, padded: llama.cpp reads no other order."""
    expected, before = 0, "the start"
    for tensor in tensors:
        what = f"the offset of tensor {shown(tensor.name)}"
        if tensor.offset % alignment:
            raise reader.refusal(f"{what} is {tensor.offset:,}, no multiple of the alignment {alignment}")
        if data_offset + tensor.offset + tensor.bytes > reader.file_bytes:
            raise reader.refusal(
                f"{what} is {tensor.offset:,} and its {tensor.bytes:,} bytes run past the end of the file ({reader.file_bytes:,} bytes)"
            )
        if tensor.offset != expected:
            fault = "overlaps" if tensor.offset < expected else "leaves a gap after"
            raise reader.refusal(f"{what} is {tensor.offset:,}, not {expected:,}, and {fault} {before}")
        expected, before = _padded(tensor.offset + tensor.bytes, alignment), f"tensor {shown(tensor.name)}"


def _padded(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment
