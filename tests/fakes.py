"""A byte-level vocabulary with special tokens, and a model that follows a script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gramlite.backends.protocol import Backend
from gramlite.generation.decoder import AnswerForm, Decoder, Generation, encode_answer
from gramlite.generation.request import Ended, Request
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


def generation(margin: float | None = None, **fields: Any) -> Generation:
    """A finished generation whose first choice leads by so many nats; None has read nothing."""
    defaults = {"thinking": None, "forced": False, "generated": 0}
    return Generation(reads=() if margin is None else ((margin, 0.0),), **{**defaults, **fields})


def request_for(key: int, prompt: Iterable[int], splits: tuple[int, ...] = (), **fields: Any) -> Request:
    """A request of a prompt's logits, or with `form` for an answer."""
    form = fields.pop("form", AnswerForm("", "", ""))
    answer = encode_answer(FakeVocabulary(), form, "think")
    return Request(key=key, prompt=tuple(prompt), answer=answer, splits=splits, **fields)


def run_all(backend: Backend, requests: Iterable[Request]) -> list[tuple[int, Generation]]:
    """Start requests in their order as there is room, until all have ended; raises the error of one that failed."""
    waiting, running, ended = list(requests), 0, []
    while waiting or running:
        while waiting and backend.start(waiting[0]):
            waiting.pop(0)
            running += 1
        for event in backend.step(1.0):
            if isinstance(event, Ended):
                if not isinstance(event.outcome, Generation):
                    raise event.outcome
                running -= 1
                ended.append((event.key, event.outcome))
    return ended


def calibration_for(judge: Judge, temperature: float = 2.0, bias: float = 0.5) -> Calibration:
    return Calibration(
        temperature=temperature, bias=bias, model=judge.model.get("sha256"), adapter=None,
        settings=order_settings(judge.settings_record), report={},
    )  # fmt: skip
