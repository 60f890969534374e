"""How much memory llama.cpp will take for a model and a context, told before anything is loaded.

Pure arithmetic on a checked GGUF header. The terms follow the graph of llama.cpp's llama, qwen2 and qwen3 models as
in llama-cpp-python 0.3.36 on a CPU, with flash attention and a unified KV cache of 16-bit floats. Weights and KV cache
are exact. The compute and output buffers were compared with what llama.cpp logs for the reference judge and seven other
shapes of 0.6B to 4B weights in 16 cases: never below, 11 % or 3 MiB above at most. The total was 0.8 % below the growth
of the process that had decoded 4,096 tokens, so leave a little room. CUDA runs the same graph; it was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gramlite.formats.gguf_header import BLOCK, Header, hyperparameters

from .memory import Prediction
from .options import RuntimeOptions

CELL_STEP = 256  # llama.cpp rounds a context up to a multiple of this
FLOAT_BYTES = 4
HALF_BYTES = 2
BYTES_PER_TOKENIZER_ENTRY = 175  # llama.cpp's tables of tokens and merges, measured on 49,152 and 152,000 tokens
GRAPH_BYTES = 1 << 20  # the graph itself and its smallest inputs
HELD_PROMPTS = 6  # three pairs that wait for more votes, both orders of each
MOST_DRAFTED = 3  # sequences together, beyond which a token guessed right saves no more time than it takes
DRAFT_TOKENS = 8  # the most tokens guessed ahead in a sequence


@dataclass(frozen=True)
class Layout:
    """How a context computes: `parallel` sequences beside the trunk, all in one cache, in batches of `micro_batch`.

    Flash attention passes over the cells of other sequences. Each sequence asks for its next token's logits, and
    where few run for those behind each token guessed ahead: `outputs` in all.
    """

    parallel: int
    micro_batch: int = 512

    @property
    def sequences(self) -> int:
        """The trunk, what runs, and the prompts that are held for votes to come."""
        return 1 + self.parallel + HELD_PROMPTS

    @property
    def outputs(self) -> int:
        return self.parallel + min(self.parallel, MOST_DRAFTED) * DRAFT_TOKENS + 1


def choose_layout(options: RuntimeOptions) -> Layout:
    """As many sequences together as were asked for; one where the same input must give the same bits."""
    return Layout(1 if options.deterministic else max(1, options.parallel or 1))


@dataclass(frozen=True)
class LayeredFootprint:
    """What llama.cpp takes for a model and its LoRA adapters in contexts laid out as `layout`, whole or by layers.

    It offloads from the last block backwards; with all of them the output head follows, one layer more. Buffers and
    adapters may lie in both memories, and are counted in both.
    """

    header: Header
    layout: Layout
    adapters: Sequence[Header] = ()
    step: ClassVar[int] = CELL_STEP
    unit: ClassVar[tuple[str, int]] = ("MiB", 1 << 20)

    @property
    def layers(self) -> int:
        return hyperparameters(self.header).blocks + 1

    def at(self, context: int) -> Prediction:
        blocks, rest = block_bytes(self.header)
        weights = sum(blocks) + rest + _tokenizer_bytes(self.header) + self._adapter_bytes
        kv_cache = kv_cache_bytes(self.header, context)
        return Prediction(weights, kv_cache, compute_bytes(self.header, self.layout, context))

    @property
    def _adapter_bytes(self) -> int:
        return sum(tensor.bytes for adapter in self.adapters for tensor in adapter.tensors)

    def layers_in(self, free: int, context: int) -> int:
        """How many layers fit `free` bytes with their KV cache, beside the compute buffers and the adapters."""
        needed = self.at(context)
        if needed.total <= free:
            return self.layers
        blocks, _ = block_bytes(self.header)
        left = free - needed.compute - self._adapter_bytes
        layers = 0
        for weights in reversed(blocks):
            left -= weights + needed.kv_cache // len(blocks)
            if left < 0:
                break
            layers += 1
        return layers

    def beside_gpu(self, layers: int, context: int) -> int:
        """Bytes of main memory that are taken while so many layers are on a GPU, 0 where all of them are there."""
        blocks, _ = block_bytes(self.header)
        if layers > len(blocks):
            return 0  # all but the embedding, which is mapped from the file
        needed = self.at(context)
        return needed.total - sum(blocks[len(blocks) - layers :]) - needed.kv_cache * layers // len(blocks)


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


def compute_bytes(header: Header, layout: Layout, context: int) -> int:
    """The compute buffer, the output buffer and the CPU's work buffer, in bytes.

    The compute buffer is as large as the greediest of three moments of the graph: attention, which reads the mask in 16
    bits; the feed-forward layer; and the logits.
    """
    sizes = hyperparameters(header)
    cells = _rounded(context)
    tokens = min(layout.micro_batch, cells)
    queries = sizes.heads * sizes.head
    outputs = min(tokens, layout.outputs)
    inputs, residual = cells // 2 + queries, 3 * sizes.embedding
    attention = tokens * (inputs + residual + 2 * queries)
    feed_forward = tokens * (inputs + residual + 3 * sizes.feed_forward)
    logits = outputs * sizes.vocabulary + tokens * residual
    graph = max(attention, feed_forward, logits) * FLOAT_BYTES
    # it starts at a row for each sequence, and grows when a batch asks for more
    rows = max(layout.sequences, outputs if outputs < tokens else 1)
    output = sizes.vocabulary * rows * FLOAT_BYTES
    work = tokens * max(sizes.feed_forward, queries) * HALF_BYTES  # activations in 16 bits
    return graph + output + work + GRAPH_BYTES


def _tokenizer_bytes(header: Header) -> int:
    entries = 0
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        items = header.metadata.get(key, ())
        entries += len(items) if isinstance(items, tuple) else 0
    return entries * BYTES_PER_TOKENIZER_ENTRY


def _rounded(cells: int) -> int:
    return -(-cells // CELL_STEP) * CELL_STEP
