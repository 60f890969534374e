"""What a GGUF header must say before llama.cpp may load the file: sizes, tokenizer and tensors that agree.

llama.cpp answers some of these faults with an exception and others by aborting the process (an assertion), so
each is refused here first, by the field's name. Keys and tensor names are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and of llama.cpp's src/models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy

from gramlite.errors import ModelError

from .architecture import FAMILIES, MAX_LAYERS, layer_tensors
from .artifact import companion_refusal
from .ggml_types import GGML_TYPES
from .gguf_format import Header, Tensor, Value, parse_header, shown

__all__ = ["Header", "Hyperparameters", "Tensor", "check_adapter_fits", "hyperparameters", "read_header"]

ARCHITECTURES = tuple(dict.fromkeys(FAMILIES.values()))
TOKENIZERS = ("gpt2", "llama")
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
UNSUPPORTED = (
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "expert_group_used_count",
    "nextn_predict_layers",
)
COMPANION = "gramlite.companion"  # the adapter file without which version 0.1 did not use a model
TEXTS = (  # what is read as text further on, where it is there
    "general.name", "tokenizer.chat_template", "tokenizer.ggml.pre", "gramlite.template.name", "gramlite.template.sha256",
    "gramlite.template.text",
)  # fmt: skip
WEIGHT_TYPES = frozenset(kind.name for kind in GGML_TYPES.values() if kind.weight)
SPECIAL_ID = re.compile(r"tokenizer\.ggml\.\w+_token_id")
BLOCK = re.compile(r"blk\.(\d+)\.")
LORA = re.compile(r"(.+)\.lora_([ab])")


@dataclass(frozen=True)
class Hyperparameters:
    """The sizes of a model, in elements; `context` is what it was trained for, in tokens."""

    blocks: int
    embedding: int
    feed_forward: int
    heads: int
    key_value_heads: int
    head: int
    context: int
    vocabulary: int


def read_header(path: Path, *, expect: Literal["model", "adapter"] = "model") -> Header:
    """Read and check the header of a GGUF model or LoRA adapter; the weights are not read.

    Raises ModelError that names the offending field. Takes under two seconds, and little memory, on any file.
    """
    header = parse_header(path)
    _check_kind(header, expect)
    for key in TEXTS:
        _typed(header, key, "string", "")
    if expect == "adapter":
        _check_adapter(header)
        return header
    if COMPANION in header.metadata:
        raise companion_refusal(path, header.metadata[COMPANION])
    _check_tokenizer(header)
    sizes = hyperparameters(header)
    _check_rope_and_norm(header, sizes)
    _check_tensors(header, sizes)
    return header


def hyperparameters(header: Header) -> Hyperparameters:
    """The sizes a model header declares; raises ModelError for one that is missing or makes no sense."""

    def whole(name: str, limit: int, default: int | None = None) -> int:
        key = f"{header.architecture}.{name}"
        value = _typed(header, key, "uint32", default)
        if not isinstance(value, int) or not 1 <= value <= limit:
            raise header.refusal(f"'{key}' is {value}; it must be from 1 to {limit:,}")
        return value

    blocks = whole("block_count", MAX_LAYERS)
    embedding = whole("embedding_length", 1 << 17)
    feed_forward = whole("feed_forward_length", 1 << 20)
    context = whole("context_length", 1 << 27)
    heads = whole("attention.head_count", 1 << 12)
    key_value_heads = whole("attention.head_count_kv", 1 << 12, heads)
    prefix = header.architecture
    if heads % key_value_heads:
        raise header.refusal(f"'{prefix}.attention.head_count_kv' is {key_value_heads}, which does not divide {heads}")
    if embedding % heads and f"{prefix}.attention.key_length" not in header.metadata:
        raise header.refusal(f"'{prefix}.embedding_length' is {embedding}, which {heads} heads do not divide")
    head = whole("attention.key_length", 1 << 12, max(embedding // heads, 1))
    value_head = whole("attention.value_length", 1 << 12, max(embedding // heads, 1))
    if value_head != head:
        raise header.refusal(f"'{prefix}.attention.value_length' is {value_head} and the key length is {head}")
    tokens = header.metadata["tokenizer.ggml.tokens"]
    vocabulary = len(tokens) if isinstance(tokens, tuple) else 0
    return Hyperparameters(blocks, embedding, feed_forward, heads, key_value_heads, head, context, vocabulary)


def check_adapter_fits(adapter: Header, model: Header) -> None:
    """Check that each tensor of a LoRA adapter has its tensor in the model, with matching sizes.

    Raises ModelError that names both files and the first tensor that differs.
    """
    advice = f"Use the adapter with the model it was trained on, not {model.path}"
    if adapter.architecture != model.architecture:
        raise ModelError(f"{adapter.path} adapts a {adapter.architecture} model. {advice}.")
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    for name, (a, b) in _lora_pairs(adapter).items():
        if name not in shapes:
            raise ModelError(f"{adapter.path} adapts {shown(name)}, which the model does not have. {advice}.")
        adapted = (b.shape[1], a.shape[1]) if name == "token_embd.weight" else (a.shape[0], b.shape[1])
        if adapted != shapes[name]:
            raise ModelError(
                f"{adapter.path} adapts {shown(name)} with the shape {list(adapted)}; the model's is {list(shapes[name])}. {advice}."
            )


def _typed(header: Header, key: str, kind: str, default: Value | None = None) -> Value:
    """The value of a key that must be of one type; where it is absent `default`, or a refusal without one."""
    if key not in header.metadata:
        if default is None:
            raise header.refusal(f"'{key}' is missing")
        return default
    if header.types[key] != kind:
        raise header.refusal(f"'{key}' is of type {header.types[key]}; it must be {kind}")
    return header.metadata[key]


def _check_kind(header: Header, expect: str) -> None:
    kind = _typed(header, "general.type", "string", "model")
    if kind != expect:
        if kind == "adapter":
            raise ModelError(f"{header.path} is a LoRA adapter (general.type), no model. Give it as --adapter.")
        if kind == "model":
            raise ModelError(f"{header.path} is a model (general.type), no LoRA adapter. Give it as -m.")
        raise header.refusal(f"'general.type' is {shown(kind)}; it must be '{expect}'")
    architecture = _typed(header, "general.architecture", "string")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{header.path} is refused: 'general.architecture' is {shown(architecture)}; supported are "
            f"{', '.join(ARCHITECTURES)}. Use a model of one of these architectures."
        )
    splits = header.metadata.get("split.count", 1)
    if not isinstance(splits, int) or splits > 1:
        raise ModelError(
            f"{header.path} is refused: 'split.count' is {shown(splits)}: it is one piece of a split model. "
            "Join the pieces first: llama-gguf-split --merge FIRST_PIECE WHOLE.gguf"
        )
    if not header.tensors:
        raise header.refusal("the tensor count is 0")


def _check_tokenizer(header: Header) -> None:
    model = _typed(header, "tokenizer.ggml.model", "string")
    if model not in TOKENIZERS:
        raise header.refusal(f"'tokenizer.ggml.model' is {shown(model)}; supported are {', '.join(TOKENIZERS)}")
    tokens = _typed(header, "tokenizer.ggml.tokens", "array[string]")
    if not isinstance(tokens, tuple) or not tokens:
        raise header.refusal("'tokenizer.ggml.tokens' is empty")
    if len(set(tokens)) != len(tokens):  # llama.cpp aborts on these
        raise header.refusal("'tokenizer.ggml.tokens' has the same token twice")
    _check_token_arrays(header, len(tokens))
    if model == "gpt2":
        _typed(header, "tokenizer.ggml.merges", "array[string]")
        if not header.metadata.get("tokenizer.ggml.pre"):
            raise ModelError(
                f"{header.path} is refused: 'tokenizer.ggml.pre' is missing, so llama.cpp would split words by a default "
                "that the model was hardly trained with. Convert the model again with a current converter, which says "
                "how its tokenizer splits them."
            )
    elif missing := {f"<0x{byte:02X}>" for byte in range(256)}.difference(tokens):
        # llama.cpp falls back on them for unknown text, and ends the process where one is missing
        raise header.refusal(f"'tokenizer.ggml.tokens' lacks the byte token {min(missing)}")
    for key in header.metadata:
        if SPECIAL_ID.fullmatch(key):
            token = _typed(header, key, "uint32")
            if not isinstance(token, int) or token >= len(tokens):
                raise header.refusal(f"'{key}' is {token}, outside the vocabulary of {len(tokens):,} tokens")
    for end in ("bos", "eos"):
        flag, key = f"tokenizer.ggml.add_{end}_token", f"tokenizer.ggml.{end}_token_id"
        if _typed(header, flag, "bool", False) and key not in header.metadata:
            raise header.refusal(f"'{key}' is missing, and '{flag}' asks for it")


def _check_token_arrays(header: Header, vocabulary: int) -> None:
    kinds = _typed(header, "tokenizer.ggml.token_type", "array[int32]")
    scores = header.metadata.get("tokenizer.ggml.scores", kinds)
    score_type = header.types.get("tokenizer.ggml.scores", "array[float32]")
    if score_type not in ("array[float32]", "array[int32]"):
        raise header.refusal(f"'tokenizer.ggml.scores' is of type {score_type}; it must be array[float32]")
    for key, items in (("token_type", kinds), ("scores", scores)):
        if not isinstance(items, numpy.ndarray) or len(items) != vocabulary:
            count = len(items) if isinstance(items, numpy.ndarray) else 0
            raise header.refusal(
                f"'tokenizer.ggml.{key}' has {count:,} items and 'tokenizer.ggml.tokens' {vocabulary:,}"
            )
    if isinstance(kinds, numpy.ndarray) and (int(kinds.min()) < 0 or int(kinds.max()) > 6):
        raise header.refusal("'tokenizer.ggml.token_type' has a value that is not from 0 to 6")
    if isinstance(scores, numpy.ndarray) and not numpy.isfinite(scores).all():
        raise header.refusal("'tokenizer.ggml.scores' has a value that is not finite")


def _check_rope_and_norm(header: Header, sizes: Hyperparameters) -> None:
    prefix = header.architecture

    def number(name: str, default: float | None, fits: Callable[[float], bool], wanted: str) -> None:
        value = _typed(header, f"{prefix}.{name}", "float32", default)
        if not isinstance(value, float) or not math.isfinite(value) or not fits(value):
            raise header.refusal(f"'{prefix}.{name}' is {value}; it must be {wanted}")

    number("attention.layer_norm_rms_epsilon", None, lambda value: 0 <= value < 1, "from 0 to 1")
    number("rope.freq_base", 10000.0, lambda value: value > 0, "above 0")
    number("rope.scaling.factor", 1.0, lambda value: value >= 0, "0 or more")
    rotated = _typed(header, f"{prefix}.rope.dimension_count", "uint32", sizes.head)
    if rotated != sizes.head or sizes.head % 2:
        raise header.refusal(f"'{prefix}.rope.dimension_count' is {rotated}; it must be {sizes.head} and even")
    scaling = _typed(header, f"{prefix}.rope.scaling.type", "string", "none")
    if scaling not in ROPE_SCALINGS:
        raise header.refusal(f"'{prefix}.rope.scaling.type' is {shown(scaling)}; known are {', '.join(ROPE_SCALINGS)}")
    for name in UNSUPPORTED:
        if _typed(header, f"{prefix}.{name}", "uint32", 0):
            raise header.refusal(f"'{prefix}.{name}' is not 0: only dense models are supported")
    if not _typed(header, f"{prefix}.attention.causal", "bool", True):
        raise header.refusal(f"'{prefix}.attention.causal' is false: it is an encoder, which cannot judge")


def _check_tensors(header: Header, sizes: Hyperparameters) -> None:
    tensors = {tensor.name: tensor for tensor in header.tensors}
    for name, shape in _expected_shapes(header.architecture, sizes).items():
        if name not in tensors:
            if name == "output.weight":  # absent where it is tied to the embedding
                continue
            raise header.refusal(f"the tensor '{name}' is missing")
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise header.refusal(f"the tensor '{name}' has the shape {found}; the metadata ask for {list(shape)}")
    for tensor in header.tensors:
        block = BLOCK.match(tensor.name)
        if block and int(block[1]) >= sizes.blocks:
            raise header.refusal(f"the tensor '{tensor.name}' lies beyond the block_count of {sizes.blocks}")
        plain = len(tensor.shape) == 1 or tensor.name.endswith(("_norm.weight", ".bias"))
        if plain and tensor.type != "F32":  # llama.cpp's kernels abort on these
            raise header.refusal(f"the tensor '{tensor.name}' is {tensor.type}; llama.cpp needs F32 there")
        if tensor.type not in WEIGHT_TYPES:
            raise header.refusal(f"the tensor '{tensor.name}' is {tensor.type}, which cannot hold weights")


def _expected_shapes(architecture: str, sizes: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """The tensors of a model and their shapes, row length first."""
    queries, keys = sizes.heads * sizes.head, sizes.key_value_heads * sizes.head
    layer = layer_tensors(architecture, sizes.embedding, sizes.feed_forward, queries, keys, sizes.head)
    table = (sizes.embedding, sizes.vocabulary)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": table,
        "output_norm.weight": table[:1],
        "output.weight": table,
    }
    for index in range(sizes.blocks):
        shapes |= {f"blk.{index}.{name}.weight": shape[::-1] for name, shape in layer.values()}
    return shapes


def _check_adapter(header: Header) -> None:
    kind = _typed(header, "adapter.type", "string")
    if kind != "lora":
        raise header.refusal(f"'adapter.type' is {shown(kind)}; only 'lora' is supported")
    alpha = _typed(header, "adapter.lora.alpha", "float32")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0:
        raise header.refusal(f"'adapter.lora.alpha' is {alpha}; it must be a number of 0 or more")
    for name, (a, b) in _lora_pairs(header).items():
        rank_a, rank_b = (a.shape[0], b.shape[0]) if name == "token_embd.weight" else (a.shape[1], b.shape[0])
        if rank_a != rank_b:
            raise header.refusal(f"the adapter of '{name}' has the ranks {rank_a} and {rank_b}")


def _lora_pairs(header: Header) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors of each adapted tensor, by the tensor's name in the model."""
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in header.tensors:
        match = LORA.fullmatch(tensor.name)
        if not match:
            raise header.refusal(f"the tensor '{tensor.name}' does not end in .lora_a or .lora_b")
        if len(tensor.shape) != 2 or tensor.type not in WEIGHT_TYPES:
            raise header.refusal(
                f"the tensor '{tensor.name}' is {tensor.type} {list(tensor.shape)}, no matrix of weights"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            raise header.refusal(f"the adapter of '{name}' lacks its .lora_{'b' if 'a' in pair else 'a'} tensor")
    return {name: (pair["a"], pair["b"]) for name, pair in halves.items()}
