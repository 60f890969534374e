"""What a folder in Hugging Face's layout holds and takes, read from its headers: bytes, quantization, memory."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from gramlite.errors import GramliteError, ModelError
from gramlite.formats.model_folder import ModelFolder

from .options import PIECE
from .placement import Footprint

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def stored_bytes(path: Path) -> dict[str, int]:
    """The bytes of a folder's tensors by their type, every file's header checked; ModelError for what is refused."""
    from gramlite.formats.checkpoint import read_safetensors_header, weight_files

    sizes: dict[str, int] = {}
    for file in weight_files(path):
        for tensor in read_safetensors_header(file).values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return sizes


def bytes_when_quantized(path: Path, bits: float) -> dict[str, int]:
    """As `stored_bytes`, with the linear layers of the blocks at `bits` a weight; other tensors stay as they are."""
    from gramlite.formats.checkpoint import read_safetensors_header, weight_files

    sizes: dict[str, int] = {}
    for file in weight_files(path):
        for name, tensor in read_safetensors_header(file).items():
            linear = ".layers." in name and len(tensor.shape) == 2
            kind, size = ("U8", int(prod(tensor.shape) * bits / 8)) if linear else (tensor.dtype, tensor.bytes)
            sizes[kind] = sizes.get(kind, 0) + size
    return sizes


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
    from gramlite.formats.architecture import expected_tensors, read_architecture

    try:
        tensors = expected_tensors(read_architecture(folder.config))
    except GramliteError:
        return None
    return sum(int(prod(tensor.shape)) for tensor in tensors.values())


def footprint(folder: ModelFolder, sizes: Mapping[str, int], item: int) -> Footprint:
    """What the model takes with floating point numbers of `item` bytes; quantized bytes stay as they are.

    Computing needs the attention scores and the feed-forward layer of one piece and one row of logits, roughly.
    """
    weights = sum(size // ITEM_BYTES[kind] * item if kind in ITEM_BYTES else size for kind, size in sizes.items())
    heads = folder.count("num_attention_heads")
    head_size = folder.count("head_dim", folder.count("hidden_size") // heads)
    key_values = folder.count("num_key_value_heads", heads) * head_size
    wide = 8 * folder.count("hidden_size") + 4 * folder.count("intermediate_size", 4 * folder.count("hidden_size"))
    compute = PIECE * (wide + heads * min(folder.context, 8192)) * 4 + folder.count("vocab_size") * 8
    return Footprint(weights=weights, token=2 * folder.count("num_hidden_layers") * key_values * item, compute=compute)
