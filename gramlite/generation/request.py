"""What a backend is asked for: one generation, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .decoder import Decoder


@dataclass(frozen=True)
class Request:
    """One generation to make: `prompt` (token ids, scaffold included) and the `decoder` to run on it.

    `splits` are lengths of the prompt's beginning, ascending, that other requests are likely to share; a backend may
    keep them computed. Up to `reuse` tokens (None: all) may be taken from what earlier requests left, so that a prompt
    is computed in the same pieces whatever came before it. `key` comes back with the generation.
    """

    key: int
    prompt: tuple[int, ...]
    decoder: Decoder
    splits: tuple[int, ...] = ()
    reuse: int | None = None
