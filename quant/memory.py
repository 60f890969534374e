"""The device of a layer by layer pass, the memory a run took, and what the arithmetic says a model needs."""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from dataclasses import dataclass
from typing import Any

import psutil

from gramlite.errors import InputError, ResourceError
from gramlite.formats.gptq_folder import SHARD_BYTES
from gramlite.runtime import torch_devices
from gramlite.runtime.machine import free_memory, thread_count

from .batches import BATCH_TOKENS

logger = logging.getLogger("gramlite")

SAMPLE_SECONDS = 0.05
PROCESS_BYTES = 400 << 20  # Python with torch and transformers, as measured
HELD_BYTES = 192 << 20  # freed memory that may lie about
SCALE_BYTES = 3 / 64  # a scale and a zero point for 64 weights
LINEARS = 7  # of a layer
CUDA = "cuda"


class PeakMemory:
    """The largest resident memory of this process, or the largest allocation on a CUDA device, while it is open."""

    def __init__(self, device: str = "cpu") -> None:
        self.peak = 0
        self._device = device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        closed = False
        while not closed:
            closed = self._stop.wait(SAMPLE_SECONDS)
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        if on_cuda(self._device):
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        if on_cuda(self._device):
            import torch

            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._sampler.join()


def on_cuda(device: str) -> bool:
    return device.startswith(CUDA)


@dataclass(frozen=True, kw_only=True)
class RunPrediction:
    """Bytes that each part of a run needs at its height, above those of the process itself."""

    process: int
    gradients: int
    quantizing: int
    writing: int

    @property
    def total(self) -> int:
        return self.process + max(self.gradients, self.quantizing, self.writing)


def predict_bytes(
    config: dict[str, Any],
    tokens: int,
    *,
    batch: int = 0,
    room: int = 0,
    bits: int = 4,
    focus: bool = True,
    device: str = "cpu",
) -> RunPrediction:
    """The memory that GPTQ needs over `tokens` tokens, a shared prefix counted once, from a checkpoint's config.json.

    `batch` is the most tokens that pass through a layer at once (1,024 where 0), `room` the bytes of layer inputs that
    may be kept at a time while gradients are taken. Weights and states are float32 on a CPU
    and 16 bits wide on CUDA, where only what is on the device counts. For each part:

    gradients: what enters each layer for one batch, or for as many as `room` holds, and either the embedding or one
    layer and what its backward keeps, in the order of 20 vectors of the model's width and 12 of the feed-forward's a
    token
    quantizing: the layer, all tokens' states and the widest linear's inputs of them, eight such inputs of a batch, four
    second moments of the widest linear, eight copies of its weight, and the packed layers that are not written yet,
    once more while a shard is written
    writing: the last shard twice, and the embedding as it was read and as float16
    """
    cuda = on_cuda(device)
    item = 2 if cuda else 4
    hidden, wide, layers = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or hidden // heads)
    key_values = int(config.get("num_key_value_heads") or heads) * head_size
    weights = hidden * (2 * heads * head_size + 2 * key_values) + 3 * hidden * wide
    widest = max(wide, hidden, heads * head_size)
    batch = min(tokens, batch or BATCH_TOKENS)

    table = 0 if cuda else 2 * int(config["vocab_size"]) * hidden
    tables = table * (1 if config.get("tie_word_embeddings") else 2)
    packed = 0 if cuda else int(layers * weights * (bits / 8 + SCALE_BYTES))
    pending = min(packed, SHARD_BYTES)
    focused = 4 * LINEARS * layers * tokens if focus and not cuda else 0

    kept = max((layers + 1) * batch * hidden * item, room)
    backward = weights * item + batch * (20 * hidden + 12 * wide) * item
    solver = (4 * widest * widest + 8 * widest * hidden) * 4
    states = tokens * (hidden + widest) * item + 8 * batch * widest * item
    shard = min(packed + tables, SHARD_BYTES + table)
    return RunPrediction(
        process=0 if cuda else PROCESS_BYTES + HELD_BYTES,
        gradients=focused + kept + max(table, backward) if focus else 0,
        quantizing=focused + weights * item + states + solver + pending * (2 if packed > SHARD_BYTES else 1),
        writing=focused + 2 * shard + 2 * table,
    )


def check_memory(predicted: RunPrediction, device: str) -> None:
    """Raise ResourceError where a run takes more than is free; what the process holds already counts as free."""
    free = free_bytes(device)
    held = 0 if on_cuda(device) else min(psutil.Process().memory_info().rss, predicted.process)
    if predicted.total - held > free:
        raise ResourceError(
            f"Quantizing takes {predicted.total / 1e9:,.1f} GB on {device} and {(free + held) / 1e9:,.1f} GB are free. "
            "Lower --tokens, give shorter pairs, or choose another --device."
        )


def free_bytes(device: str) -> int:
    """Memory that nobody uses: the machine's for "cpu", else that of the CUDA device."""
    if device == "cpu":
        return free_memory()
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


class FreedMemory:
    """Freed memory that glibc keeps, given back to the system whenever the process has grown by HELD_BYTES.

    Its heap cannot reuse the hole of an aligned block for another one of the same size, and so grows with every layer.
    """

    def __init__(self, device: str = "cpu") -> None:
        linux = sys.platform.startswith("linux") and not on_cuda(device)
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if linux else None
        self._process = psutil.Process()
        self._least = self._process.memory_info().rss

    def release(self) -> None:
        if self._trim is not None and self._process.memory_info().rss > self._least + HELD_BYTES:
            self._trim(0)
            self._least = self._process.memory_info().rss


def pick_device(choice: str) -> str:
    """The torch device for "auto", "cpu" or "cuda"; auto says on the log why it is not CUDA.

    Raises ResourceError where CUDA was asked for and is not usable, InputError for another word.
    """
    if choice not in ("auto", "cpu", CUDA):
        raise InputError(f"--device {choice} is unknown; it is auto, cpu or cuda.")
    import torch

    found = torch_devices.machine()
    if choice != "cpu" and found.gpus:
        return CUDA
    if choice == CUDA:
        raise ResourceError(
            f"--device cuda was asked for, but {found.why_no_gpu}. Type --device cpu, or: gramlite doctor"
        )
    torch.set_num_threads(thread_count(None))
    if choice == "auto":
        logger.info("Quantizing on the CPU: %s.", found.why_no_gpu)
    return "cpu"
