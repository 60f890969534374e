"""The device of a layer by layer pass, the memory a run took, and what the arithmetic says a model needs."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil

from gramlite.errors import InputError, ResourceError

logger = logging.getLogger("gramlite")

SAMPLE_SECONDS = 0.05
CUDA = "cuda"


class PeakMemory:
    """The largest resident memory of this process, or the largest allocation on a CUDA device, while it is open."""

    def __init__(self, device: str = "cpu") -> None:
        self.peak = 0
        self._device = device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._look()

    def __enter__(self) -> PeakMemory:
        if self._device.startswith(CUDA):
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._look()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.startswith(CUDA):
            import torch

            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._sampler.join()
            self._look()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes that a pass needs at its height, by what they hold."""

    layer: int
    states: int
    inner: int
    solver: int

    @property
    def total(self) -> int:
        return self.layer + self.states + self.inner + self.solver


def predict_bytes(config: dict[str, Any], tokens: int, *, device: str = "cpu") -> Prediction:
    """The memory a pass over `tokens` tokens needs, from a checkpoint's config.json.

    One decoder layer; the hidden states of all tokens; the widest linear's inputs of all tokens; and for the widest
    linear its second moment, four matrices of that size while it is factored, and five copies of its weight while it is
    solved, all float32. Weights and states are float32 on a CPU and 16 bits wide on CUDA.
    """
    item = 2 if device.startswith(CUDA) else 4
    hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or hidden // heads)
    key_values = int(config.get("num_key_value_heads") or heads) * head_size
    layer = hidden * (2 * heads * head_size + 2 * key_values) + 3 * hidden * wide
    widest = max(wide, hidden, heads * head_size)
    return Prediction(
        layer=layer * item,
        states=tokens * hidden * item,
        inner=tokens * widest * item,
        solver=(4 * widest * widest + 5 * widest * hidden) * 4,
    )


def pick_device(choice: str) -> str:
    """The torch device for "auto", "cpu" or "cuda"; auto says on the log why it is not CUDA.

    Raises ResourceError where CUDA was asked for and is not usable, InputError for another word.
    """
    if choice == "cpu":
        return "cpu"
    if choice not in ("auto", CUDA):
        raise InputError(f"--device {choice} is unknown; it is auto, cpu or cuda.")
    import torch

    if torch.cuda.is_available():
        return CUDA
    reason = "this build of torch has no CUDA" if torch.version.cuda is None else "no CUDA device answers"
    if choice == CUDA:
        raise ResourceError(f"--device cuda was asked for, and {reason}. Use --device cpu.")
    logger.info("Quantizing on the CPU: %s.", reason)
    return "cpu"
