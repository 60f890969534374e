"""A byte-level vocabulary with special tokens, and a model that follows a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gramlite.generation.decoder import Decoder, Generation
from gramlite.judging.confidence import Calibration, order_settings
from gramlite.judging.judge import Judge

END = 256


@dataclass(frozen=True)
class FakeVocabulary:
    """One token a byte; special tokens from 300 on; `merges` are further tokens of several bytes."""

    special_tokens: Mapping[str, int] = field(default_factory=dict)
    merges: Mapping[bytes, int] = field(default_factory=dict)
    end_tokens: frozenset[int] = frozenset({END})
    size: int = 400

    def encode(self, text: str) -> list[int]:
        for literal in self.special_tokens:  # as llama.cpp does with USER_DEFINED tokens
            assert literal not in text, f"the special token {literal!r} reached the tokenizer as text"
        data, tokens = text.encode(), []
        while data:
            merge = next((m for m in sorted(self.merges, key=len, reverse=True) if data.startswith(m)), data[:1])
            tokens.append(self.merges.get(merge, merge[0]))
            data = data[len(merge) :]
        return tokens

    def piece(self, token: int) -> bytes:
        if token < END:
            return bytes([token])
        return next((merge for merge, known in self.merges.items() if known == token), b"")

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode()


def logits_for(token: int, size: int = 400, **others: float) -> np.ndarray:
    logits = np.zeros(size, dtype=np.float32)
    logits[token] = 50
    for character, value in others.items():
        logits[ord(character)] = value
    return logits


def run_script(
    decoder: Decoder, script: Sequence[int], *, a: float = 2.0, b: float = 0.5
) -> tuple[Generation, list[int]]:
    """Let a model that wants to write `script` run; returns the generation and every token that was fed."""
    fed: list[int] = []
    wanted = list(script)
    while not decoder.finished:
        if decoder.answering:
            logits = logits_for(END, A=a, B=b)
        else:
            logits = logits_for(wanted.pop(0) if wanted else END)
        fed += decoder.advance(logits)
    return decoder.result(), fed


def calibration_for(judge: Judge, temperature: float = 2.0, bias: float = 0.5) -> Calibration:
    return Calibration(
        temperature=temperature, bias=bias, model=judge.model.get("sha256"), adapter=None,
        settings=order_settings(judge.settings_record), report={},
    )  # fmt: skip
