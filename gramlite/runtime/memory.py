"""How much memory llama.cpp will take for a model and a context, told before anything is loaded.

Pure arithmetic on a checked GGUF header. The terms follow the graph of llama.cpp's llama, qwen2 and qwen3 models as
in llama-cpp-python 0.3.36 on a CPU, with a unified KV cache of 16-bit floats. Weights and KV cache are exact. The
compute and output buffers were compared with what llama.cpp logs for the reference judge and seven other shapes of
0.6B to 4B weights, 512 to 65,536 cells, micro-batches of 128 to 2,048 tokens (58 cases, flash attention off): never
below, 2 % above in the middle, 6 % or 7 MiB at most; with flash attention on (16 cases) 11 % or 3 MiB at most.
The total was 0.8 % below the growth of the process that had decoded 4,096 tokens, so leave a little room. CUDA runs
the same graph; it was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gramlite.errors import ResourceError
from gramlite.formats.gguf_header import BLOCK, Header, hyperparameters

CELL_STEP = 256  # llama.cpp rounds a context up to a multiple of this
FLOAT_BYTES = 4
HALF_BYTES = 2
BYTES_PER_TOKENIZER_ENTRY = 175  # llama.cpp's tables of tokens and merges, measured on 49,152 and 152,000 tokens
GRAPH_BYTES = 1 << 20  # the graph itself and its smallest inputs


@dataclass(frozen=True, kw_only=True)
class ContextSize:
    """What the memory of a context depends on.

    `cells` is the total of KV cells, all sequences together; `micro_batch` is n_ubatch; `outputs` is how many
    tokens of a batch give logits (n_outputs_max), None for all of a micro-batch; `sequences` is n_seq_max.
    """

    cells: int
    micro_batch: int = 512
    outputs: int | None = None
    sequences: int = 1
    flash_attention: bool = False


@dataclass(frozen=True)
class Prediction:
    """Bytes that a loaded model will take; `weights` includes the tokenizer's tables, and the adapters' weights."""

    weights: int
    kv_cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute


def predict(header: Header, context: ContextSize, *, adapters: Sequence[Header] = ()) -> Prediction:
    """The memory, in bytes, of a model with one context and its LoRA adapters."""
    blocks, rest = block_bytes(header)
    weights = sum(blocks) + rest + _tokenizer_bytes(header)
    weights += sum(tensor.bytes for adapter in adapters for tensor in adapter.tensors)
    return Prediction(weights, kv_cache_bytes(header, context.cells), compute_bytes(header, context))


def block_bytes(header: Header) -> tuple[tuple[int, ...], int]:
    """The weights of each block, and those of the rest (embedding, output and their norms), in bytes.

    A tied embedding is counted once; llama.cpp copies it when the output goes to another device than the input.
    """
    blocks = [0] * hyperparameters(header).blocks
    rest = 0
    for tensor in header.tensors:
        match = BLOCK.match(tensor.name)
        if match:
            blocks[int(match[1])] += tensor.bytes
        else:
            rest += tensor.bytes
    return tuple(blocks), rest


def kv_cache_bytes(header: Header, cells: int) -> int:
    """Keys and values of every block, in 16-bit floats, for `cells` tokens rounded up as llama.cpp does."""
    sizes = hyperparameters(header)
    return _rounded(cells) * sizes.blocks * 2 * sizes.key_value_heads * sizes.head * HALF_BYTES


def compute_bytes(header: Header, context: ContextSize) -> int:
    """The compute buffer, the output buffer and the CPU's work buffer, in bytes.

    The compute buffer is as large as the greediest of three moments of the graph: attention, with a score for
    each head, token and cell; the feed-forward layer; and the logits.
    """
    sizes = hyperparameters(header)
    cells = _rounded(context.cells)
    tokens = min(context.micro_batch, cells)
    queries, keys = sizes.heads * sizes.head, sizes.key_value_heads * sizes.head
    outputs = min(tokens, tokens if context.outputs is None else context.outputs)
    residual = 3 * sizes.embedding
    if context.flash_attention:
        inputs = cells // 2 + queries  # the mask in 16 bits, and what the kernel reads
        scores = 0
    else:
        inputs = cells + 2 * keys  # the mask, and 64-bit indices that scatter the transposed values
        scores = cells * sizes.heads
    attention = tokens * (inputs + scores + residual + 2 * queries)
    feed_forward = tokens * (inputs + residual + 3 * sizes.feed_forward)
    logits = outputs * sizes.vocabulary + tokens * residual
    graph = max(attention, feed_forward, logits) * FLOAT_BYTES
    # without a limit llama.cpp starts at a row for each sequence, and grows when a batch asks for more
    rows = max(context.sequences, outputs if outputs < tokens else 1)
    output = sizes.vocabulary * rows * FLOAT_BYTES
    work = tokens * max(scores, sizes.feed_forward, queries) * HALF_BYTES  # activations in 16 bits
    return graph + output + work + GRAPH_BYTES


def largest_context(header: Header, context: ContextSize, *, free_bytes: int, adapters: Sequence[Header] = ()) -> int:
    """The most cells that fit in `free_bytes` with the other settings of `context`; 0 where not even 256 do.

    At most what each sequence can use of the model's training context.
    """
    low, high = 0, hyperparameters(header).context * context.sequences // CELL_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if predict(header, replace(context, cells=middle * CELL_STEP), adapters=adapters).total <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return low * CELL_STEP


def require_fit(
    header: Header, context: ContextSize, *, free_bytes: int, adapters: Sequence[Header] = ()
) -> Prediction:
    """The prediction, where it fits in `free_bytes`.

    Raises ResourceError with the needed and the free bytes and the largest context that would fit.
    """
    prediction = predict(header, context, adapters=adapters)
    if prediction.total <= free_bytes:
        return prediction
    cells = largest_context(header, context, free_bytes=free_bytes, adapters=adapters)
    if cells:
        advice = f"The largest context that fits is {cells:,}: add --context {cells}, or free some memory."
    else:
        advice = f"No context fits, not even {CELL_STEP}: free some memory, or use a smaller quantization."
    parts = (prediction.weights, prediction.kv_cache, prediction.compute)
    weights, kv_cache, compute = (f"{part / 1e6:,.0f} MB" for part in parts)
    raise ResourceError(
        f"{header.path} with a context of {context.cells:,} needs {prediction.total:,} bytes (weights {weights}, "
        f"KV cache {kv_cache}, compute {compute}) and {free_bytes:,} are free. {advice}"
    )


def _tokenizer_bytes(header: Header) -> int:
    entries = 0
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        items = header.metadata.get(key, ())
        entries += len(items) if isinstance(items, tuple) else 0
    return entries * BYTES_PER_TOKENIZER_ENTRY


def _rounded(cells: int) -> int:
    return -(-cells // CELL_STEP) * CELL_STEP
