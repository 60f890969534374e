"""The one GGUF writer: the `gguf` package lays out the header, the tensors' bytes stream behind it, hashed on the way.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from gramlite.console import Advance

from .architecture import Architecture, ExpectedTensor, rope_factors
from .ggml_types import tensor_bytes
from .gguf_header import read_header
from .gguf_vocabulary import GgufVocabulary
from .hashed_output import HashedOutput
from .publish import unicode_name
from .tokenization import compare_tokenizers

ALIGNMENT = 32
HEADER_BYTES = 32 << 20  # more than a header takes, for who asks for room on the disk
EXACT = ("F32", "F16", "BF16")

Data = Iterable[tuple[str, Iterable[Any]]]  # tensors' names in the file's order, and the buffers that make up each


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file: `shape` has the row length last, `kind` is ggml's name of its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def bytes(self) -> int:
        return tensor_bytes(self.shape, self.kind)


@dataclass(frozen=True)
class ModelPlan:
    """A model's file: its sizes, its tokenizer, and its tensors in order; `file_type` is llama.cpp's name for it."""

    architecture: Architecture
    vocabulary: GgufVocabulary
    file_type: str
    tensors: tuple[tuple[ExpectedTensor, str], ...]

    @property
    def payload(self) -> int:
        return sum(tensor_bytes(tensor.shape, kind) for tensor, kind in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return round(8 * self.payload / sum(math.prod(tensor.shape) for tensor, _ in self.tensors), 4)


def write_model(
    path: Path, plan: ModelPlan, data: Data, *, name: str, template: dict[str, Any] | None, advance: Advance
) -> str:
    """Write a model's GGUF and return its sha256; `data` yields the tensors of `plan` in their order."""
    import gguf

    def describe(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(unicode_name(name))
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if plan.file_type == "F32" else f"MOSTLY_{plan.file_type}"])
        if plan.file_type not in EXACT:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_architecture(writer, plan.architecture)
        add_vocabulary(writer, plan.vocabulary)
        add_template(writer, template)

    tensors = [PlannedTensor(tensor.target, tensor.shape, kind) for tensor, kind in plan.tensors]
    factors = rope_factors(plan.architecture)
    if factors is not None:
        tensors.insert(0, PlannedTensor("rope_freqs.weight", factors.shape, "F32"))
        data = chain([("rope_freqs.weight", [factors])], data)
    return write_gguf(path, plan.architecture.family, describe, tensors, data, advance=advance)


def write_gguf(
    path: Path,
    family: str,
    describe: Callable[[Any], None],
    tensors: Sequence[PlannedTensor],
    data: Data,
    *,
    advance: Advance = lambda name, done: None,
) -> str:
    """Write a GGUF file and return its sha256; `describe` puts the metadata into a `gguf.GGUFWriter`.

    Of `data` no more than one buffer is held at a time. Raises OSError where the disk is full.
    """
    import gguf

    writer = gguf.GGUFWriter(path, family)
    try:
        describe(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, numpy.dtype(numpy.float32), tensor.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with HashedOutput(path) as output:
        output.pad(ALIGNMENT)
        for name, pieces in data:
            for piece in pieces:
                output.put(piece)
                advance(name, memoryview(piece).nbytes)
            output.pad(ALIGNMENT)
        return output.finish()


def check_written(path: Path, folder: Path) -> int | None:
    """Read a file back as a judge would: its header by the bounded parser, its tokenizer against the source's own.

    Returns how many strings both tokenize alike, None where there is nothing to compare with.
    """
    read_header(path)
    return compare_tokenizers(path, folder)


def add_template(writer: Any, template: dict[str, Any] | None) -> None:
    """Put the judge's template into a GGUF's metadata."""
    for key in ("name", "sha256", "text"):
        if template:
            writer.add_string(f"gramlite.template.{key}", str(template[key]))


def add_architecture(writer: Any, architecture: Architecture) -> None:
    """The family's sizes under llama.cpp's keys."""
    import gguf

    writer.add_vocab_size(architecture.vocabulary)
    writer.add_context_length(architecture.context)
    writer.add_embedding_length(architecture.hidden)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.feed_forward)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_size)
    writer.add_value_length(architecture.head_size)
    writer.add_rope_dimension_count(architecture.head_size)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_freq_base(architecture.rope.base)
    if architecture.rope.scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(architecture.rope.scaling))
        writer.add_rope_scaling_factor(architecture.rope.settings["factor"])
    if architecture.rope.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(architecture.rope.settings["original_max_position_embeddings"]))


def add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    """The tokenizer under llama.cpp's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unknown", writer.add_unk_token_id),
        ("padding", writer.add_pad_token_id),
    ):
        if name in vocabulary.special:
            add(vocabulary.special[name])
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    writer.add_string("gramlite.tokenizer.normalizer", vocabulary.normalizer or "")
    if vocabulary.chat_templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in vocabulary.chat_templates.items()])
