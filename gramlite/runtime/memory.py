"""What a model takes of a device's memory, told before anything is loaded: the form in which every backend says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Prediction:
    """Bytes that a model will take with one context, its adapters counted among the weights."""

    weights: int
    kv_cache: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a model that runs as a whole: its weights, a token of its KV cache, and what computing needs besides.

    It is one layer, as far as splitting goes, and its context may be of any length.
    """

    weights: int
    token: int
    compute: int
    layers: ClassVar[int] = 1
    step: ClassVar[int] = 1
    unit: ClassVar[tuple[str, int]] = ("MB", 10**6)  # in which sizes are told

    def at(self, context: int) -> Prediction:
        return Prediction(self.weights, self.token * context, self.compute)

    def total(self, context: int) -> int:
        return self.at(context).total

    def layers_in(self, free: int, context: int) -> int:
        """How many layers fit `free` bytes of a GPU."""
        return int(self.total(context) <= free)

    def beside_gpu(self, layers: int, context: int) -> int:
        """Bytes of main memory that are taken while so many layers are on a GPU."""
        return 0 if layers else self.total(context)
