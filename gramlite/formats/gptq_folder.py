"""The standard GPTQ checkpoint: what transformers with gptqmodel, vLLM and AutoGPTQ load.

For each quantized linear, instead of its weight (in the classic "gptq" format, also called v1):

    qweight  int32 [in * bits / 32, out]      codes, packed along the inputs, low bits first
    qzeros   int32 [groups, out * bits / 32]  zero points less one, packed along the outputs
    scales   float16 [groups, out]
    g_idx    int32 [in]                       the group of each input

All other tensors stay float16. "gptq_v2" differs in that zero points are stored as they are; it is read, not written.

GPTQ-for-LLaMa began with the less one (its issue 230), so symmetric 4 bits store 7; AutoGPTQ's pull request 640 brought
"gptq_v2", which stores 8. Which of the two a folder has is what checkpoint_format is for, and published folders say it
wrongly (vLLM's pull request 38966: Qwen's with 8 under "gptq"). Where a folder is symmetric its zero points say it
themselves, for the true one is the middle code, and they are believed. Asymmetric ones can be told apart by no value but
the all-ones that "gptq" makes of 0, which its readers make 2**bits of, and which is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gramlite.errors import ModelError
from gramlite.storage import json_bytes

from .carried import carry_files
from .checkpoint import INDEX, StoredTensor, read_safetensors_header, weight_files
from .model_folder import read_json_object
from .quantized_linear import QuantizedLinear, natural_groups
from .save_tensors import save_tensors
from .tensor_stream import convert, read_bytes

SHARD_BYTES = 1 << 30
PARTS = ("qweight", "qzeros", "scales")


def pack_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Pack codes [n, m] along their first axis into words [n * bits / 32, m]: a stream of bits, low ones first.

    3-bit codes cross the borders of words, as in AutoGPTQ's kernels.
    """
    stream = (codes[:, None, :] >> np.arange(bits, dtype=np.uint8)[None, :, None]) & 1
    packed = np.packbits(stream.reshape(-1, codes.shape[1]), axis=0, bitorder="little")
    columns_first = np.ascontiguousarray(packed.T).view("<i4")
    return np.ascontiguousarray(columns_first.T)


def unpack_words(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """The codes [n, m] that `pack_words` packed into words [n * bits / 32, m]."""
    columns_first = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    stream = np.unpackbits(columns_first, axis=1, bitorder="little").reshape(words.shape[1], -1, bits)
    codes = (stream << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    return np.ascontiguousarray(codes.T)


def pack_linear(linear: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
    """A layer's four tensors, by the last part of their names."""
    return {
        "qweight": pack_words(np.ascontiguousarray(linear.codes.T), linear.bits),
        "qzeros": np.ascontiguousarray(pack_words(linear.zeros - np.uint8(1), linear.bits)).T.copy(),
        "scales": np.ascontiguousarray(linear.scales.T),
        "g_idx": linear.group_index,
    }


class GptqWriter:
    """Writes a GPTQ checkpoint into an empty folder, about 1 GiB of it in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, npt.NDArray[Any]] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Add a quantized layer under its module's name, without `.weight`."""
        for part, tensor in pack_linear(linear).items():
            self.add(f"{name}.{part}", tensor)

    def add(self, name: str, tensor: npt.NDArray[Any]) -> None:
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        if self._pending_bytes >= SHARD_BYTES:
            self._flush()

    def finish(self, config: dict[str, Any], quantization: dict[str, Any], source: Path) -> None:
        """Write the last shard, the index, the configuration, and carry the tokenizer's files along."""
        if self._pending:
            self._flush()
        self._name_shards()
        types = {"dtype": "float16", "torch_dtype": "float16"}
        (self.folder / "config.json").write_bytes(json_bytes(config | types | {"quantization_config": quantization}))
        (self.folder / "quantize_config.json").write_bytes(json_bytes(quantization))
        carry_files(source, self.folder)

    def _flush(self) -> None:
        save_tensors(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _name_shards(self) -> None:
        total = len(self._shards)
        if total == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_bytes(json_bytes(index))


@dataclass(frozen=True)
class GptqFolder:
    """A GPTQ checkpoint: `linears` are the names of its quantized modules, in the order of the layers.

    `stored_zero_offset` is what zero points are stored less, `labelled_offset` what it would be by checkpoint_format.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    linears: tuple[str, ...]
    stored_zero_offset: int
    labelled_offset: int

    @property
    def files(self) -> list[Path]:
        """The files that hold its tensors."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def read_linear(self, name: str) -> QuantizedLinear:
        """A module in the neutral form; bits and group size are those its own tensors' shapes imply.

        Raises ModelError where tensors are missing or don't fit each other, or a zero point is out of range.
        """
        bits = self._bits(name)
        words, packed_zeros = self._read(f"{name}.qweight"), self._read(f"{name}.qzeros")
        scales = self._float16(f"{name}.scales")
        columns, groups = words.shape[0] * 32 // bits, len(scales)
        zeros = unpack_words(np.ascontiguousarray(packed_zeros.T), bits).astype(np.int32) + self.stored_zero_offset
        if int(zeros.max()) >= 1 << bits:
            raise ModelError(
                f"{name} in {self.folder} has zero points above {(1 << bits) - 1} by its checkpoint_format 'gptq', which "
                "its readers disagree about. Quantize the checkpoint again, or save it in the format gptq_v2."
            )
        return QuantizedLinear(
            codes=np.ascontiguousarray(unpack_words(words, bits).T),
            scales=np.ascontiguousarray(scales.T),
            zeros=zeros.astype(np.uint8),
            group_index=self._group_index(name, columns, columns // groups),
            bits=bits,
            group_size=columns // groups,
        )

    def symmetric_offset(self, *, declared: bool) -> int:
        """What zero points are stored less so that each is the middle code; the label's where they are no such thing.

        Raises ModelError where that is `declared` and not so, or one layer stores them as the other does not.
        """
        found = {self._symmetric_offset(name) for name in self.linears}
        offset = found.pop() if len(found) == 1 else None
        if offset is None and declared:
            raise ModelError(
                f"{self.folder} says that it is symmetric (sym) and has zero points that are the middle code neither as "
                "checkpoint_format 'gptq' stores it nor as 'gptq_v2' does. Quantize the checkpoint again."
            )
        return self.labelled_offset if offset is None else offset

    def _symmetric_offset(self, name: str) -> int | None:
        """0 or 1 where every stored zero point is the middle code less so much, else None."""
        bits, stored = self._bits(name), self._read(f"{name}.qzeros")
        rows = stored.shape[1] * 32 // bits
        for offset in (0, 1):
            middle = np.full((rows, 1), (1 << (bits - 1)) - offset, dtype=np.uint8)
            if np.array_equal(stored, np.broadcast_to(pack_words(middle, bits).T, stored.shape)):
                return offset
        return None

    def _bits(self, name: str) -> int:
        """A module's bits by the shapes of its tensors; raises ModelError unless these belong together."""
        words, zeros, scales = (self._stored(f"{name}.{part}").shape for part in PARTS)
        if not len(words) == len(zeros) == len(scales) == 2 or 0 in (*words, *zeros, *scales):
            raise ModelError(f"{name} in {self.folder} has tensors that are no matrices. Download it again.")
        groups, rows = scales
        bits: int = zeros[1] * 32 // rows
        fits = (zeros[0], words[1], zeros[1] * 32) == (groups, rows, bits * rows)
        if not fits or bits not in (2, 3, 4, 8) or words[0] * 32 // bits % groups:
            raise ModelError(f"{name} in {self.folder} has qweight, qzeros and scales that do not fit each other.")
        return bits

    def read_float(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor that is not quantized, in float32."""
        stored = self._stored(name)
        if stored.dtype not in ("F16", "F32", "BF16"):
            raise ModelError(f"{name!r} in {self.folder} is stored as {stored.dtype}; F16, BF16 or F32 is needed.")
        values: npt.NDArray[np.float32] = convert(read_bytes(stored), stored.dtype, "F32")
        return values.reshape(stored.shape)

    def _group_index(self, name: str, columns: int, group_size: int) -> npt.NDArray[np.int32]:
        if f"{name}.g_idx" not in self.tensors:
            return natural_groups(columns, group_size)
        return self._read(f"{name}.g_idx").astype(np.int32)

    def _float16(self, name: str) -> npt.NDArray[np.float16]:
        values = self.read_float(name)
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            raise ModelError(f"{name!r} in {self.folder} holds scales that float16 cannot hold.")
        return half

    def _read(self, name: str) -> npt.NDArray[np.int32]:
        stored = self._stored(name)
        if stored.dtype != "I32":
            raise ModelError(f"{name!r} in {self.folder} is stored as {stored.dtype}; only I32 words are known.")
        return np.frombuffer(read_bytes(stored), np.dtype("<i4")).reshape(stored.shape)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise ModelError(f"{self.folder} lacks the tensor {name!r}. Download it again.")
        return self.tensors[name]


def open_gptq(folder: Path) -> GptqFolder:
    """Open a GPTQ checkpoint; raises ModelError where the folder is none, or in a format that is not known.

    So it does where its zero points contradict what the folder says of them, before any weight is read.
    """
    config = read_json_object(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and (folder / "quantize_config.json").is_file():
        quantization = read_json_object(folder / "quantize_config.json")
    if not isinstance(quantization, dict) or quantization.get("quant_method", "gptq") != "gptq":
        raise ModelError(f"{folder} is no GPTQ checkpoint: its config.json has no quantization_config of that method.")
    layout = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ModelError(f"{folder} is in the GPTQ layout {layout!r}; only gptq and gptq_v2 can be read.")
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= read_safetensors_header(file)
    linears = tuple(
        name.removesuffix(".qweight") for name in sorted(tensors, key=_layer_order) if name.endswith(".qweight")
    )
    if not linears:
        raise ModelError(f"{folder} holds no quantized layer.")
    labelled = 1 if layout == "gptq" else 0
    found = GptqFolder(folder, config, tensors, linears, labelled, labelled)
    if quantization.get("sym") is False:
        return found
    return replace(found, stored_zero_offset=found.symmetric_offset(declared=bool(quantization.get("sym"))))


def _layer_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
