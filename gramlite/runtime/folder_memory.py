"""What a folder in Hugging Face's layout holds and takes, read from its headers: bytes, quantization, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

from gramlite.errors import GramliteError, ModelError
from gramlite.formats.architecture import expected_tensors, read_architecture
from gramlite.formats.checkpoint import read_safetensors_header, weight_files
from gramlite.formats.model_folder import ModelFolder

from .memory import Footprint
from .options import PIECE

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def stored_bytes(path: Path, *, linear_bits: float | None = None) -> dict[str, int]:
    """The bytes of a folder's tensors by their type, every file's header checked; ModelError for what is refused.

    With `linear_bits` they are what is left once the linear layers of the blocks take so many bits a weight.
    """
    sizes: Counter[str] = Counter()
    for file in weight_files(path):
        for name, tensor in read_safetensors_header(file).items():
            if linear_bits and ".layers." in name and len(tensor.shape) == 2:
                sizes["U8"] += int(prod(tensor.shape) * linear_bits / 8)
            else:
                sizes[tensor.dtype] += tensor.bytes
    return dict(sizes)


def bytes_when_quantized(path: Path, bits: float) -> dict[str, int]:
    return stored_bytes(path, linear_bits=bits)


def stored_type(path: Path, sizes: Mapping[str, int]) -> str:
    """The floating point type that most bytes have; raises ModelError where there is none that is known."""
    known = {kind: size for kind, size in sizes.items() if kind in ITEM_BYTES}
    if not known:
        raise ModelError(f"{path} holds no F32, F16 or BF16 tensor, only {', '.join(sizes) or 'nothing'}.")
    return max(known, key=lambda kind: known[kind])


def quantization_of(folder: ModelFolder) -> str | None:
    """NF4, FP4, INT8 or GPTQ with its bits as config.json says, None for full precision; ModelError for anything else."""
    settings = folder.config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ModelError(f"{folder.path / 'config.json'} has a quantization_config that is none. Download it again.")
    method = settings.get("quant_method")
    if method == "bitsandbytes":
        return "INT8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "nf4")).upper()
    if method == "gptq":
        return f"GPTQ {settings.get('bits')}-bit"
    raise ModelError(f"{folder.path} is quantized with {method!r}, which no backend here runs.")


def weight_count(folder: ModelFolder) -> int | None:
    """How many weights the architecture has, whatever they are stored as; None for one that is not known."""
    try:
        tensors = expected_tensors(read_architecture(folder.config))
    except GramliteError:
        return None
    return sum(int(prod(tensor.shape)) for tensor in tensors.values())


def footprint(folder: ModelFolder, sizes: Mapping[str, int], item: int) -> Footprint:
    """What the model takes with floating point numbers of `item` bytes; quantized bytes stay as they are."""
    weights = sum(size // ITEM_BYTES[kind] * item if kind in ITEM_BYTES else size for kind, size in sizes.items())
    key_values = folder.count("num_key_value_heads", folder.count("num_attention_heads")) * head_size(folder)
    return Footprint(
        weights=weights,
        token=2 * folder.count("num_hidden_layers") * key_values * item,
        compute=compute_bytes(folder, folder.count("vocab_size")),
    )


def head_size(folder: ModelFolder) -> int:
    return folder.count("head_dim", folder.count("hidden_size") // folder.count("num_attention_heads"))


def compute_bytes(folder: ModelFolder, vocabulary: int) -> int:
    """The attention scores and the feed-forward layer of one piece and one row of logits, roughly."""
    wide = 8 * folder.count("hidden_size") + 4 * folder.count("intermediate_size", 4 * folder.count("hidden_size"))
    scores = folder.count("num_attention_heads") * min(folder.context, 8192)
    return PIECE * (wide + scores) * 4 + vocabulary * 8
