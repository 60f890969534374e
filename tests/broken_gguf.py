"""Small GGUF files made by hand: valid ones, and many that are each broken in one named way.

Every test that must survive a bad model file can use `broken_files()`. The writer shares no code with
gramlite.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

UINT8, UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
FORMATS = {UINT8: "<B", UINT16: "<H", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<B", UINT64: "<Q"}
F32, F16, Q4_K, Q8_0, Q8_1, I32 = 0, 1, 12, 8, 9, 26
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_K: (256, 144), Q8_0: (32, 34), Q8_1: (32, 36), I32: (1, 4)}
WIDTH, HEADS, KEY_VALUE_HEADS, INNER, LAYERS = 32, 2, 1, 64, 2
HEAD = WIDTH // HEADS
RANK = 4


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: object) -> bytes:
    return text(value) if kind == STRING else struct.pack(FORMATS[kind], value)  # type: ignore[arg-type]


def array(kind: int, values: list[object]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)


@dataclass
class TensorInfo:
    name: bytes
    shape: list[int]
    kind: int
    data: bytes
    offset: int | None = None  # None: where it belongs


@dataclass
class Pieces:
    """A GGUF file before it is written; a broken file is a valid one with a piece changed."""

    keys: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    key_count: int | None = None
    tensor_count: int | None = None

    def put(self, key: str, kind: int, value: object) -> None:
        """Set a scalar or string, in its old place where the key is there already."""
        self.put_raw(key, kind, scalar(kind, value))

    def put_array(self, key: str, kind: int, values: list[object]) -> None:
        self.put_raw(key, ARRAY, array(kind, values))

    def put_raw(self, key: str, kind: int, payload: bytes) -> None:
        entry = (key.encode(), kind, payload)
        for index, (name, _, _) in enumerate(self.keys):
            if name == entry[0]:
                self.keys[index] = entry
                return
        self.keys.append(entry)

    def drop(self, key: str) -> None:
        self.keys = [entry for entry in self.keys if entry[0] != key.encode()]

    def tensor(self, name: str) -> TensorInfo:
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def drop_tensor(self, name: str) -> None:
        self.tensors = [tensor for tensor in self.tensors if tensor.name != name.encode()]

    def add_tensor(self, name: str | bytes, shape: list[int], kind: int = F32) -> None:
        block, size = BLOCKS[kind]
        elements = 1
        for dimension in shape:
            elements *= dimension
        name = name.encode() if isinstance(name, str) else name
        self.tensors.append(TensorInfo(name, shape, kind, weights(kind, elements // block * size)))

    def header(self) -> bytes:
        """All that comes before the padding in front of the weights."""
        key_count = len(self.keys) if self.key_count is None else self.key_count
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        result = self.magic + struct.pack("<IQQ", self.version, tensor_count, key_count)
        for key, kind, payload in self.keys:
            result += text(key) + struct.pack("<I", kind) + payload
        offset = 0
        for tensor in self.tensors:
            place = offset if tensor.offset is None else tensor.offset
            result += text(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            result += struct.pack("<IQ", tensor.kind, place)
            offset += len(self.padded(tensor.data))
        return result

    def padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)

    def file(self) -> bytes:
        return self.padded(self.header()) + b"".join(self.padded(tensor.data) for tensor in self.tensors)


def weights(kind: int, size: int) -> bytes:
    """Small finite numbers in the layout of a type; the same ones every time."""
    source = random.Random(size)
    if kind == F32:
        return struct.pack(f"<{size // 4}f", *(source.uniform(-0.1, 0.1) for _ in range(size // 4)))
    if kind == F16:
        return struct.pack(f"<{size // 2}e", *(source.uniform(-0.1, 0.1) for _ in range(size // 2)))
    if kind == Q8_0:
        return b"".join(struct.pack("<e", 0.001) + source.randbytes(32) for _ in range(size // 34))
    return bytes(size)


def byte_alphabet() -> list[str]:
    """The 256 symbols of byte-level BPE: printable Latin-1 as itself, the others moved above it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


def model_pieces(architecture: str = "llama", tokenizer: str = "gpt2") -> Pieces:
    """A model of two blocks with a whole vocabulary, which llama.cpp loads and runs."""
    pieces = Pieces()
    special: list[object] = ["<unk>", "<|im_start|>", "<|im_end|>"]
    plain: list[object] = [f"<0x{byte:02X}>" for byte in range(256)] if tokenizer == "llama" else list(byte_alphabet())
    tokens = [*special, *plain, "ab"]
    pieces.put("general.architecture", STRING, architecture)
    pieces.put("general.type", STRING, "model")
    pieces.put("general.name", STRING, "tiny")
    for name, value in (
        ("block_count", LAYERS),
        ("context_length", 256),
        ("embedding_length", WIDTH),
        ("feed_forward_length", INNER),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KEY_VALUE_HEADS),
        ("rope.dimension_count", HEAD),
    ):
        pieces.put(f"{architecture}.{name}", UINT32, value)
    pieces.put(f"{architecture}.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5)
    pieces.put(f"{architecture}.rope.freq_base", FLOAT32, 10000.0)
    pieces.put("tokenizer.ggml.model", STRING, tokenizer)
    pieces.put("tokenizer.ggml.pre", STRING, "default")
    pieces.put_array("tokenizer.ggml.tokens", STRING, tokens)
    pieces.put_array("tokenizer.ggml.scores", FLOAT32, [0.0] * len(tokens))
    kinds: list[object] = [3, 3, 3, *([6] * 256 if tokenizer == "llama" else [1] * 256), 1]
    pieces.put_array("tokenizer.ggml.token_type", INT32, kinds)
    if tokenizer == "gpt2":
        pieces.put_array("tokenizer.ggml.merges", STRING, ["a b"])
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        pieces.put(f"tokenizer.ggml.{name}_token_id", UINT32, token)
    pieces.put("tokenizer.ggml.add_bos_token", BOOL, 0)
    pieces.add_tensor("token_embd.weight", [WIDTH, len(tokens)], F16)
    for layer in range(LAYERS):
        for name, shape, kind in (
            ("attn_norm", [WIDTH], F32),
            ("attn_q", [WIDTH, WIDTH], Q8_0),
            ("attn_k", [WIDTH, HEAD * KEY_VALUE_HEADS], Q8_0),
            ("attn_v", [WIDTH, HEAD * KEY_VALUE_HEADS], F16),
            ("attn_output", [WIDTH, WIDTH], Q8_0),
            ("ffn_norm", [WIDTH], F32),
            ("ffn_gate", [WIDTH, INNER], Q8_0),
            ("ffn_up", [WIDTH, INNER], Q8_0),
            ("ffn_down", [INNER, WIDTH], F32),
            *((("attn_q_norm", [HEAD], F32), ("attn_k_norm", [HEAD], F32)) if architecture == "qwen3" else ()),
        ):
            pieces.add_tensor(f"blk.{layer}.{name}.weight", shape, kind)
    pieces.add_tensor("output_norm.weight", [WIDTH], F32)
    return pieces


def adapter_pieces() -> Pieces:
    """A LoRA adapter that fits `model_pieces()`."""
    pieces = Pieces()
    pieces.put("general.architecture", STRING, "llama")
    pieces.put("general.type", STRING, "adapter")
    pieces.put("adapter.type", STRING, "lora")
    pieces.put("adapter.lora.alpha", FLOAT32, float(RANK))
    for layer in range(LAYERS):
        pieces.add_tensor(f"blk.{layer}.attn_q.weight.lora_a", [WIDTH, RANK], F32)
        pieces.add_tensor(f"blk.{layer}.attn_q.weight.lora_b", [RANK, WIDTH], F32)
    return pieces


def valid_model() -> bytes:
    return model_pieces().file()


def valid_adapter() -> bytes:
    return adapter_pieces().file()


# ------------------------------------------------------------------ broken in one way each
Break = Callable[[Pieces], object]


def put(key: str, kind: int, value: object) -> Break:
    return lambda pieces: pieces.put(key, kind, value)


def put_array(key: str, kind: int, values: list[object]) -> Break:
    return lambda pieces: pieces.put_array(key, kind, values)


def put_raw(key: str, kind: int, payload: bytes) -> Break:
    return lambda pieces: pieces.put_raw(key, kind, payload)


def drop(key: str) -> Break:
    return lambda pieces: pieces.drop(key)


def change(**values: object) -> Break:
    return lambda pieces: pieces.__dict__.update(values)


def change_tensor(which: str, /, **values: object) -> Break:
    return lambda pieces: pieces.tensor(which).__dict__.update(values)


def again(key: str) -> Break:
    return lambda pieces: pieces.keys.append(next(entry for entry in pieces.keys if entry[0] == key.encode()))


def resize(name: str, shape: list[int], kind: int) -> Break:
    """Give a tensor another shape and type, with data to match, so that only the model's sense is broken."""

    def change_shape(pieces: Pieces) -> None:
        index = pieces.tensors.index(pieces.tensor(name))
        pieces.add_tensor(name, shape, kind)
        pieces.tensors[index] = pieces.tensors.pop()

    return change_shape


TOKENS = "tokenizer.ggml.tokens"
VOCABULARY = 260
HUGE = 1 << 62
EXTRA = "extra.key"

# name: (what is changed, what the refusal must mention)
BROKEN: dict[str, tuple[Break, str]] = {
    "magic-wrong": (change(magic=b"GGUX"), "magic"),
    "magic-zip": (change(magic=b"PK\x03\x04"), "ZIP"),
    "magic-pickle": (change(magic=b"\x80\x02}q"), "pickle"),
    "magic-ggjt": (change(magic=b"tjgg"), "before GGUF"),
    "version-zero": (change(version=0), "version"),
    "version-one": (change(version=1), "version"),
    "version-four": (change(version=4), "version"),
    "version-big-endian": (change(version=3 << 24), "big-endian"),
    "key-count-huge": (change(key_count=HUGE), "metadata key count"),
    "key-count-all-ones": (change(key_count=(1 << 64) - 1), "metadata key count"),
    "key-count-beyond-file": (change(key_count=60_000), "metadata key count"),
    "key-count-one-too-many": (lambda pieces: change(key_count=len(pieces.keys) + 1)(pieces), "tensor 0"),
    "tensor-count-huge": (change(tensor_count=HUGE), "tensor count"),
    "tensor-count-beyond-file": (change(tensor_count=60_000), "tensor count"),
    "tensor-count-zero": (change(tensor_count=0), "tensor count"),
    "tensor-count-one-too-many": (
        lambda pieces: change(tensor_count=len(pieces.tensors) + 1)(pieces),
        "tensor",
    ),
    "key-empty": (lambda pieces: pieces.keys.append((b"", UINT32, bytes(4))), "metadata key"),
    "key-not-utf8": (lambda pieces: pieces.keys.append((b"a\xff\xfe", UINT32, bytes(4))), "metadata key"),
    "key-with-nul": (
        lambda pieces: pieces.keys.append((b"general.type\0x", UINT32, bytes(4))),
        "metadata key",
    ),
    "key-with-escape": (
        lambda pieces: pieces.keys.append((b"\x1b[31mred", UINT32, bytes(4))),
        "metadata key",
    ),
    "key-too-long": (lambda pieces: pieces.keys.append((b"k" * 70_000, UINT32, bytes(4))), "metadata key"),
    "key-twice": (again("general.name"), "general.name"),
    "key-twice-array": (again(TOKENS), TOKENS),
    "value-type-unknown": (put_raw(EXTRA, 13, bytes(8)), EXTRA),
    "value-type-all-ones": (put_raw(EXTRA, 0xFFFFFFFF, bytes(8)), EXTRA),
    "string-length-huge": (put_raw(EXTRA, STRING, struct.pack("<Q", HUGE)), EXTRA),
    "string-length-all-ones": (put_raw(EXTRA, STRING, b"\xff" * 8), EXTRA),
    "string-length-beyond-file": (put_raw(EXTRA, STRING, struct.pack("<Q", 10_000_000)), EXTRA),
    "string-not-utf8": (put("general.name", STRING, b"\xc3\x28"), "general.name"),
    "string-with-nul": (put("general.name", STRING, b"tiny\0evil"), "general.name"),
    "bool-two": (put_raw("tokenizer.ggml.add_bos_token", BOOL, b"\x02"), "add_bos_token"),
    "bool-array-seven": (put_raw(EXTRA, ARRAY, struct.pack("<IQB", BOOL, 1, 7)), EXTRA),
    "array-of-arrays": (put_raw(EXTRA, ARRAY, struct.pack("<IQ", ARRAY, 1) + array(UINT32, [1])), EXTRA),
    "array-of-unknown": (put_raw(EXTRA, ARRAY, struct.pack("<IQ", 99, 1) + bytes(8)), EXTRA),
    "array-length-huge": (put_raw(EXTRA, ARRAY, struct.pack("<IQ", UINT32, HUGE)), EXTRA),
    "array-length-beyond-file": (put_raw(EXTRA, ARRAY, struct.pack("<IQ", UINT32, 1_000_000)), EXTRA),
    "array-strings-huge": (put_raw(EXTRA, ARRAY, struct.pack("<IQ", STRING, HUGE)), EXTRA),
    "array-strings-beyond-file": (put_raw(EXTRA, ARRAY, struct.pack("<IQ", STRING, 1_000_000)), EXTRA),
    "array-string-length-huge": (put_raw(EXTRA, ARRAY, struct.pack("<IQQ", STRING, 1, HUGE)), EXTRA),
    "array-string-not-utf8": (put_array(EXTRA, STRING, ["a", b"\xff"]), f"{EXTRA}'[1]"),
    "array-string-with-nul": (put_array(EXTRA, STRING, ["a", "b\0c"]), EXTRA),
    "alignment-zero": (put("general.alignment", UINT32, 0), "general.alignment"),
    "alignment-not-a-power": (put("general.alignment", UINT32, 48), "general.alignment"),
    "alignment-one": (put("general.alignment", UINT32, 1), "general.alignment"),
    "alignment-huge": (put("general.alignment", UINT32, 1 << 31), "general.alignment"),
    "alignment-wrong-type": (put("general.alignment", UINT64, 32), "general.alignment"),
    "tensor-name-empty": (change_tensor("output_norm.weight", name=b""), "name of tensor 19"),
    "tensor-name-too-long": (change_tensor("output_norm.weight", name=b"n" * 65), "name of tensor 19"),
    "tensor-name-not-utf8": (change_tensor("output_norm.weight", name=b"\xfe\xff"), "name of tensor 19"),
    "tensor-name-with-nul": (
        change_tensor("output_norm.weight", name=b"output_norm.weight\0"),
        "name of tensor 19",
    ),
    "tensor-name-twice": (
        change_tensor("blk.1.attn_norm.weight", name=b"blk.0.attn_norm.weight"),
        "attn_norm",
    ),
    "dimensions-zero": (change_tensor("output_norm.weight", shape=[]), "output_norm.weight"),
    "dimensions-five": (change_tensor("output_norm.weight", shape=[2, 2, 2, 2, 2]), "output_norm.weight"),
    "dimension-of-zero": (change_tensor("output_norm.weight", shape=[0]), "output_norm.weight"),
    "dimension-huge": (change_tensor("output_norm.weight", shape=[HUGE]), "output_norm.weight"),
    "dimension-negative": (change_tensor("output_norm.weight", shape=[(1 << 64) - 32]), "output_norm.weight"),
    "dimensions-overflow": (
        change_tensor("output_norm.weight", shape=[1 << 32, 1 << 32]),
        "output_norm.weight",
    ),
    "tensor-type-unknown": (change_tensor("output_norm.weight", kind=1000), "output_norm.weight"),
    "tensor-type-removed": (change_tensor("blk.0.attn_q.weight", kind=4), "blk.0.attn_q.weight"),
    "row-not-whole-blocks": (change_tensor("blk.0.attn_q.weight", kind=Q4_K), "blk.0.attn_q.weight"),
    "offset-unaligned": (change_tensor("output_norm.weight", offset=16), "output_norm.weight"),
    "offset-beyond-file": (change_tensor("output_norm.weight", offset=1 << 40), "output_norm.weight"),
    "offset-overflow": (change_tensor("output_norm.weight", offset=(1 << 64) - 32), "output_norm.weight"),
    "offset-overlaps": (change_tensor("blk.0.attn_norm.weight", offset=0), "blk.0.attn_norm.weight"),
    "offset-leaves-gap": (change_tensor("token_embd.weight", offset=64), "token_embd.weight"),
    "data-shorter-than-tensor": (change_tensor("output_norm.weight", data=b""), "output_norm.weight"),
    "split-file": (put("split.count", UINT16, 3), "split.count"),
    "split-wrong-type": (put("split.count", STRING, "3"), "split.count"),
    "type-missing-model-is-adapter": (put("general.type", STRING, "adapter"), "adapter"),
    "type-unknown": (put("general.type", STRING, "mmproj"), "general.type"),
    "type-not-a-string": (put("general.type", UINT32, 1), "general.type"),
    "architecture-missing": (drop("general.architecture"), "general.architecture"),
    "architecture-unknown": (put("general.architecture", STRING, "mamba"), "general.architecture"),
    "architecture-not-a-string": (put("general.architecture", UINT32, 1), "general.architecture"),
    "blocks-missing": (drop("llama.block_count"), "block_count"),
    "blocks-zero": (put("llama.block_count", UINT32, 0), "block_count"),
    "blocks-negative": (put("llama.block_count", INT32, -1), "block_count"),
    "blocks-too-many": (put("llama.block_count", UINT32, 1001), "block_count"),
    "blocks-more-than-tensors": (put("llama.block_count", UINT32, 3), "blk.2.attn_q.weight"),
    "blocks-fewer-than-tensors": (put("llama.block_count", UINT32, 1), "block_count"),
    "context-missing": (drop("llama.context_length"), "context_length"),
    "context-zero": (put("llama.context_length", UINT32, 0), "context_length"),
    "context-a-string": (put("llama.context_length", STRING, "256"), "context_length"),
    "embedding-missing": (drop("llama.embedding_length"), "embedding_length"),
    "embedding-not-divisible": (put("llama.embedding_length", UINT32, 33), "embedding_length"),
    "embedding-disagrees": (put("llama.embedding_length", UINT32, 64), "rope.dimension_count"),
    "embedding-huge": (put("llama.embedding_length", UINT32, (1 << 32) - 2), "embedding_length"),
    "feed-forward-missing": (drop("llama.feed_forward_length"), "feed_forward_length"),
    "feed-forward-disagrees": (put("llama.feed_forward_length", UINT32, 96), "ffn_gate"),
    "feed-forward-an-array": (
        put_array("llama.feed_forward_length", UINT32, [64, 64]),
        "feed_forward_length",
    ),
    "heads-missing": (drop("llama.attention.head_count"), "head_count"),
    "heads-zero": (put("llama.attention.head_count", UINT32, 0), "head_count"),
    "key-value-heads-zero": (put("llama.attention.head_count_kv", UINT32, 0), "head_count_kv"),
    "key-value-heads-do-not-divide": (put("llama.attention.head_count_kv", UINT32, 3), "head_count_kv"),
    "key-length-disagrees": (put("llama.attention.key_length", UINT32, 8), "value_length"),
    "rope-dimensions-disagree": (put("llama.rope.dimension_count", UINT32, 8), "rope.dimension_count"),
    "rope-base-zero": (put("llama.rope.freq_base", FLOAT32, 0.0), "rope.freq_base"),
    "rope-base-nan": (put("llama.rope.freq_base", FLOAT32, float("nan")), "rope.freq_base"),
    "rope-scaling-unknown": (put("llama.rope.scaling.type", STRING, "warp"), "rope.scaling.type"),
    "norm-epsilon-missing": (drop("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
    "norm-epsilon-negative": (put("llama.attention.layer_norm_rms_epsilon", FLOAT32, -1.0), "layer_norm_rms"),
    "experts": (put("llama.expert_count", UINT32, 8), "expert_count"),
    "experts-used": (put("llama.expert_used_count", UINT32, 2), "expert_used_count"),
    "expert-groups": (put("llama.expert_group_count", UINT32, 1), "expert_group_count"),
    "prediction-layers": (put("llama.nextn_predict_layers", UINT32, 1), "nextn_predict_layers"),
    "encoder": (put("llama.attention.causal", BOOL, 0), "attention.causal"),
    "tokenizer-missing": (drop("tokenizer.ggml.model"), "tokenizer.ggml.model"),
    "tokenizer-unknown": (put("tokenizer.ggml.model", STRING, "t5"), "tokenizer.ggml.model"),
    "tokens-missing": (drop(TOKENS), TOKENS),
    "tokens-empty": (put_array(TOKENS, STRING, []), TOKENS),
    "tokens-are-numbers": (put_array(TOKENS, UINT32, [1, 2]), TOKENS),
    "tokens-are-no-array": (put(TOKENS, STRING, "abc"), TOKENS),
    "tokens-repeated": (put_array(TOKENS, STRING, ["a"] * VOCABULARY), TOKENS),
    "tokens-fewer-than-types": (put_array(TOKENS, STRING, ["a", "b", "c"]), "token_type"),
    "byte-tokens-missing": (put("tokenizer.ggml.model", STRING, "llama"), TOKENS),
    "merges-missing": (drop("tokenizer.ggml.merges"), "tokenizer.ggml.merges"),
    "scores-too-few": (put_array("tokenizer.ggml.scores", FLOAT32, [0.0]), "tokenizer.ggml.scores"),
    "scores-wrong-type": (
        put_array("tokenizer.ggml.scores", STRING, ["0"] * VOCABULARY),
        "tokenizer.ggml.scores",
    ),
    "scores-nan": (
        put_array("tokenizer.ggml.scores", FLOAT32, [float("nan")] * VOCABULARY),
        "tokenizer.ggml.scores",
    ),
    "token-types-missing": (drop("tokenizer.ggml.token_type"), "tokenizer.ggml.token_type"),
    "token-types-too-few": (put_array("tokenizer.ggml.token_type", INT32, [1]), "tokenizer.ggml.token_type"),
    "token-types-out-of-range": (
        put_array("tokenizer.ggml.token_type", INT32, [99] * VOCABULARY),
        "token_type",
    ),
    "bos-outside-vocabulary": (put("tokenizer.ggml.bos_token_id", UINT32, VOCABULARY), "bos_token_id"),
    "eos-outside-vocabulary": (put("tokenizer.ggml.eos_token_id", UINT32, (1 << 32) - 1), "eos_token_id"),
    "padding-outside-vocabulary": (put("tokenizer.ggml.padding_token_id", UINT32, 9999), "padding_token_id"),
    "unknown-outside-vocabulary": (put("tokenizer.ggml.unknown_token_id", UINT32, 9999), "unknown_token_id"),
    "eot-outside-vocabulary": (put("tokenizer.ggml.eot_token_id", UINT32, 9999), "eot_token_id"),
    "eos-a-string": (put("tokenizer.ggml.eos_token_id", STRING, "2"), "eos_token_id"),
    "bos-asked-for-and-missing": (
        lambda pieces: (
            drop("tokenizer.ggml.bos_token_id")(pieces),
            put("tokenizer.ggml.add_bos_token", BOOL, 1)(pieces),
        ),
        "bos_token_id",
    ),
    "embedding-tensor-missing": (lambda pieces: pieces.drop_tensor("token_embd.weight"), "token_embd.weight"),
    "embedding-tensor-too-narrow": (resize("token_embd.weight", [16, VOCABULARY], F16), "token_embd.weight"),
    "embedding-tensor-too-short": (resize("token_embd.weight", [WIDTH, 100], F16), "token_embd.weight"),
    "block-tensor-missing": (
        lambda pieces: pieces.drop_tensor("blk.1.ffn_down.weight"),
        "blk.1.ffn_down.weight",
    ),
    "block-tensor-wrong-shape": (resize("blk.1.attn_k.weight", [WIDTH, WIDTH], F16), "blk.1.attn_k.weight"),
    "output-norm-missing": (lambda pieces: pieces.drop_tensor("output_norm.weight"), "output_norm.weight"),
    "output-wrong-shape": (
        lambda pieces: pieces.add_tensor("output.weight", [WIDTH, 7], F16),
        "output.weight",
    ),
    "norm-not-float32": (resize("blk.0.attn_norm.weight", [WIDTH], F16), "blk.0.attn_norm.weight"),
    "weights-are-integers": (resize("blk.0.attn_q.weight", [WIDTH, WIDTH], I32), "blk.0.attn_q.weight"),
    "weights-are-activations": (resize("blk.0.attn_q.weight", [WIDTH, WIDTH], Q8_1), "blk.0.attn_q.weight"),
}

# whole files that no change of pieces makes
RAW: dict[str, tuple[Callable[[], bytes], str]] = {
    "file-empty": (lambda: b"", "magic"),
    "file-four-bytes": (lambda: b"GGUF", "too short"),
    "file-header-cut": (lambda: valid_model()[:20], "too short"),
    "file-cut-in-metadata": (lambda: valid_model()[:1000], "the rest of the file"),
    "file-cut-in-weights": (lambda: valid_model()[:-4096], "end of the file"),
    "file-endless-array": (lambda: endless_array(), "'k' is an array"),
    "file-safetensors": (lambda: struct.pack("<Q", 2) + b'{"a":{}}', "safetensors"),
    "file-git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
    "file-web-page": (lambda: b"<!DOCTYPE html><html>404</html>", "web page"),
    "file-gzip": (lambda: b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
    "file-zeros": (lambda: bytes(4096), "magic"),
}

BROKEN_ADAPTERS: dict[str, tuple[Break, str]] = {
    "adapter-type-missing": (drop("adapter.type"), "adapter.type"),
    "adapter-type-unknown": (put("adapter.type", STRING, "ia3"), "adapter.type"),
    "adapter-type-not-a-string": (put("adapter.type", UINT32, 1), "adapter.type"),
    "adapter-alpha-missing": (drop("adapter.lora.alpha"), "adapter.lora.alpha"),
    "adapter-alpha-an-integer": (put("adapter.lora.alpha", UINT32, 4), "adapter.lora.alpha"),
    "adapter-alpha-infinite": (put("adapter.lora.alpha", FLOAT32, float("inf")), "adapter.lora.alpha"),
    "adapter-is-a-model": (put("general.type", STRING, "model"), "model"),
    "adapter-architecture-unknown": (put("general.architecture", STRING, "bert"), "general.architecture"),
    "adapter-half-missing": (
        lambda pieces: pieces.drop_tensor("blk.0.attn_q.weight.lora_b"),
        "blk.0.attn_q.weight",
    ),
    "adapter-ranks-differ": (resize("blk.0.attn_q.weight.lora_b", [8, WIDTH], F32), "blk.0.attn_q.weight"),
    "adapter-not-a-matrix": (
        resize("blk.0.attn_q.weight.lora_a", [WIDTH * RANK], F32),
        "blk.0.attn_q.weight",
    ),
    "adapter-foreign-tensor": (lambda pieces: pieces.add_tensor("blk.0.attn_q.weight", [4], F32), "lora_a"),
}


def endless_array() -> bytes:
    """49 bytes that end in an array of 2**62 numbers; the `gguf` 0.19.0 reader counts through them all."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", ARRAY, UINT8, HUGE)


def build(pieces: Pieces, change_pieces: Break) -> bytes:
    change_pieces(pieces)
    return pieces.file()


def broken_files() -> dict[str, bytes]:
    """Files that are no usable model, by what is wrong with each."""
    files = {name: build(model_pieces(), change_pieces) for name, (change_pieces, _) in BROKEN.items()}
    return files | {name: make() for name, (make, _) in RAW.items()}


def broken_adapters() -> dict[str, bytes]:
    """Files that are no usable LoRA adapter, by what is wrong with each."""
    return {name: build(adapter_pieces(), change_pieces) for name, (change_pieces, _) in BROKEN_ADAPTERS.items()}


def named_fields() -> dict[str, str]:
    """What the refusal of each broken file must mention."""
    return {name: fragment for name, (_, fragment) in [*BROKEN.items(), *RAW.items(), *BROKEN_ADAPTERS.items()]}
