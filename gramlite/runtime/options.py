"""How an artifact is opened: what a user may ask of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cuda", "cpu"]
LoadIn = Literal["nf4", "int8"]
PIECE = 512  # tokens of a prompt that hf and onnx compute at once: bounds memory, and how long a stop has to wait


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How an artifact is opened.

    `context` is the most tokens a sequence may hold (None: the model's own, at most 8,192, less where memory is
    short); `parallel` the most sequences decoded together (None: one, and `load` has more where the settings think or
    vote); `adapter` a LoRA file; `deterministic` keeps to one sequence at a time so that the same input gives the same
    bits; `load_in` quantizes a full-precision checkpoint's linear layers while it is loaded.
    """

    device: Device = "auto"
    threads: int | None = None
    context: int | None = None
    parallel: int | None = None
    adapter: str | None = None
    deterministic: bool = False
    load_in: LoadIn | None = None
