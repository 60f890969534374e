"""The model families that can be exported: what their config.json says, and which tensors they must have.

One table of expected tensors serves the export (names, shapes, permutation), the adapter and the merge, so that a
missing, unexpected or misshapen tensor is refused by name before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from gramlite.errors import ModelError

from .model_folder import attention_window

FAMILIES = {  # a Mistral is a Llama without biases whose attention may have a window
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
}  # fmt: skip
MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS; above it, it aborts
MAX_SIZE = 1 << 31
MAX_NUMBER = 1e38  # what GGUF's float32 holds


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: `scaling` is none, linear, yarn or llama3; `settings` are the scaling's own parameters."""

    base: float
    scaling: str
    settings: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's sizes. `family` is llama.cpp's name; `tied` says that the head is the embedding; sizes in elements."""

    family: str
    vocabulary: int
    context: int
    hidden: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    norm_epsilon: float
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that the checkpoint must have: `target` is its GGUF name, `heads` > 0 asks for the rope permutation."""

    name: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0


def family_of(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a model's family; raises ModelError where its graphs were never compared with transformers."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ModelError(f"The architecture {architecture!r} is unknown here. Known are {', '.join(FAMILIES)}.")
    kind = config.get("model_type")  # which is what transformers goes by
    if kind is not None and f"{kind}forcausallm" != str(architecture).lower():
        raise ModelError(f"config.json says {architecture!r} and model_type {kind!r}. Put the right ones there.")
    return family


def read_architecture(config: dict[str, Any]) -> Architecture:
    """The sizes in a config.json; raises ModelError, which names the entry, for what llama.cpp would compute otherwise."""
    family = family_of(config)
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    kv_heads = _count(config, "num_key_value_heads", default=heads)
    head_size = _count(config, "head_dim", default=hidden // heads)
    result = Architecture(
        family=family,
        vocabulary=_count(config, "vocab_size"),
        context=min(_count(config, "max_position_embeddings"), attention_window(config) or MAX_SIZE),
        hidden=hidden,
        layers=_count(config, "num_hidden_layers", limit=MAX_LAYERS),
        feed_forward=_count(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        rope=_read_rope(config, family),
        tied=_flag(config, "tie_word_embeddings"),
        attention_bias=family == "qwen2" or _flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
    )
    _refuse_what_differs(config, result)
    return result


def _refuse_what_differs(config: dict[str, Any], architecture: Architecture) -> None:
    """Settings that transformers honours and llama.cpp's graph of the family does not."""
    family, mistral = architecture.family, config.get("model_type") == "mistral"
    faults = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "num_key_value_heads": architecture.heads % architecture.kv_heads != 0,
        "head_dim": architecture.head_size % 2 != 0
        or (family == "qwen2" and architecture.head_size * architecture.heads != architecture.hidden),
        "use_sliding_window": _flag(config, "use_sliding_window"),
        "partial_rotary_factor": _number(config, "partial_rotary_factor", 1.0) != 1.0,
        "attention_bias": (family == "qwen3" or mistral) and architecture.attention_bias,
        "mlp_bias": (family != "llama" or mistral) and architecture.mlp_bias,
    }
    for key, wrong in faults.items():
        if wrong:
            raise ModelError(
                f"config.json's {key} = {config.get(key)!r} cannot be expressed for {family} in GGUF. Export another checkpoint."
            )


def _read_rope(config: dict[str, Any], family: str) -> Rope:
    """Both spellings: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` from before."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"config.json's rope scaling {scaling!r} is unusable. Download the checkpoint again.")
    base = _number(scaling, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    needed = {
        "default": (),
        "linear": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    extras = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if not isinstance(kind, str) or kind not in needed or (kind == "llama3" and family != "llama"):
        raise ModelError(
            f"The rope scaling {kind!r} is not supported for {family}. Supported are linear, yarn, and llama3 for Llama."
        )
    unknown = {key for key, value in scaling.items() if value is not None} - set(needed[kind]) - extras
    if kind != "default" and unknown:
        raise ModelError(
            f"The rope scaling {kind!r} has the setting {sorted(unknown)[0]!r}, which GGUF cannot express."
        )
    settings = {key: _number(scaling, key, 0.0) for key in needed[kind]}
    if base <= 0 or not all(value > 0 for value in settings.values()):
        raise ModelError(
            f"config.json's rope settings are not all positive: {scaling!r}. Download the checkpoint again."
        )
    return Rope(base=base, scaling="none" if kind == "default" else str(kind), settings=settings)


def rope_factors(architecture: Architecture) -> NDArray[numpy.float32] | None:
    """What each rotary frequency is divided by under Llama 3.1's scaling, float32 of head_size / 2; else None.

    High frequencies stay, low ones are divided by `factor`, those between are interpolated (Llama 3.1's released code).
    """
    if architecture.rope.scaling != "llama3":
        return None
    settings = architecture.rope.settings
    low, high, context = (
        settings[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for index in range(0, architecture.head_size, 2):
        wavelength = 2 * math.pi * architecture.rope.base ** (index / architecture.head_size)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(settings["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / settings["factor"] + smooth))
    return numpy.array(factors, dtype=numpy.float32)


def layer_tensors(
    family: str, hidden: int, feed_forward: int, queries: int, keys: int, head_size: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a layer of every family has beside biases, by the module's name: its name in GGUF, and its weight's shape."""
    norms = {"input_layernorm": ("attn_norm", (hidden,)), "post_attention_layernorm": ("ffn_norm", (hidden,))}
    if family == "qwen3":
        norms |= {f"self_attn.{name}_norm": (f"attn_{name}_norm", (head_size,)) for name in "qk"}
    return {
        "self_attn.q_proj": ("attn_q", (queries, hidden)),
        "self_attn.k_proj": ("attn_k", (keys, hidden)),
        "self_attn.v_proj": ("attn_v", (keys, hidden)),
        "self_attn.o_proj": ("attn_output", (hidden, queries)),
        "mlp.gate_proj": ("ffn_gate", (feed_forward, hidden)),
        "mlp.up_proj": ("ffn_up", (feed_forward, hidden)),
        "mlp.down_proj": ("ffn_down", (hidden, feed_forward)),
        **norms,
    }


def expected_tensors(architecture: Architecture) -> dict[str, ExpectedTensor]:
    """Every tensor a checkpoint of this architecture has, by its Hugging Face name."""
    hidden, head_size = architecture.hidden, architecture.head_size
    queries, keys = architecture.heads * head_size, architecture.kv_heads * head_size
    layer = layer_tensors(architecture.family, hidden, architecture.feed_forward, queries, keys, head_size)
    parts = {f"{name}.weight": (f"{target}.weight", shape) for name, (target, shape) in layer.items() if shape[1:]}
    for name, (target, shape) in layer.items():
        if _has_bias(architecture, name):
            parts[f"{name}.bias"] = (f"{target}.bias", shape[:1])
    parts |= {f"{name}.weight": (f"{target}.weight", shape) for name, (target, shape) in layer.items()}
    table = (architecture.vocabulary, hidden)
    found: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("token_embd.weight", table)}
    for index in range(architecture.layers):
        found |= {
            f"model.layers.{index}.{name}": (f"blk.{index}.{part}", shape) for name, (part, shape) in parts.items()
        }
    found["model.norm.weight"] = ("output_norm.weight", (hidden,))
    if not architecture.tied:
        found["lm_head.weight"] = ("output.weight", table)
    return {
        name: ExpectedTensor(name, target, shape, permuted_heads(architecture, name))
        for name, (target, shape) in found.items()
    }


def _has_bias(architecture: Architecture, name: str) -> bool:
    if name.startswith("mlp."):
        return architecture.mlp_bias
    without = name == "self_attn.o_proj" and architecture.family == "qwen2"
    return architecture.attention_bias and name.endswith("_proj") and not without


def permuted_heads(architecture: Architecture, name: str) -> int:
    """How many heads a q or k projection's rows fall into where llama.cpp wants them permuted for rope, else 0."""
    if architecture.family != "llama":
        return 0
    return architecture.heads if ".q_proj." in name else architecture.kv_heads if ".k_proj." in name else 0


def gguf_names(architecture: Architecture) -> Callable[[str], str]:
    """A function from a tensor's Hugging Face name to its GGUF name; it raises ModelError for a name without one."""
    names = {name: tensor.target for name, tensor in expected_tensors(architecture).items()}

    def target(name: str) -> str:
        if name not in names:
            raise ModelError(
                f"The tensor {name!r} has no GGUF name in {architecture.family}. Export another checkpoint."
            )
        return names[name]

    return target


def _count(values: dict[str, Any], key: str, *, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= limit:
        raise ModelError(
            f"config.json's {key} is {value!r}; it must be a whole number from 1 to {limit:,}. Download it again."
        )
    return value


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
        raise ModelError(f"config.json's {key} is {value!r}; it must be a number. Download it again.")
    return float(value)


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key)
    if value not in (None, True, False):
        raise ModelError(f"config.json's {key} is {value!r}; it must be true or false. Download it again.")
    return bool(value)
