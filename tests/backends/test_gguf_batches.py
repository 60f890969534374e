"""Batches that stay within llama.cpp's arrays, and what a run that ends early leaves to the next one."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gramlite import GramliteError, Pair
from gramlite.backends.gguf.backend import GgufBackend
from gramlite.backends.gguf.context import LlamaContext
from gramlite.generation.request import Request

from .conftest import Probe, tiny_backend, tiny_judge

MICRO_BATCH = 512
CLOSING = 10  # tokens that close a rationale by force


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every batch that is computed."""
    found: list[int] = []
    decode = LlamaContext.decode

    def counting(self: LlamaContext) -> None:
        found.append(self.filled)
        decode(self)

    monkeypatch.setattr(LlamaContext, "decode", counting)
    return found


def closing_votes(count: int) -> list[tuple[Request, Probe]]:
    """Votes on one prompt that all wait with as many tokens, each with its own."""
    prompt = tuple(random.Random(1).randrange(10, 250) for _ in range(30))
    votes = []
    for key in range(count):
        probe = Probe([[10 + key] * CLOSING, [11 + key]])
        votes.append((Request(key, prompt, probe, (30,)), probe))  # type: ignore[arg-type]
    return votes


def test_votes_that_close_together_take_as_many_batches_as_they_need(tiny: Path, sizes: list[int]) -> None:
    together = tiny_backend(tiny, parallel=64)
    votes = closing_votes(64)
    assert sorted(key for key, _ in together.generate([request for request, _ in votes])) == list(range(64))
    together.close()
    assert sizes[1:3] == [510, 130], "51 votes, then the other 13"
    one_by_one = tiny_backend(tiny)
    alone = closing_votes(64)
    list(one_by_one.generate([request for request, _ in alone]))
    one_by_one.close()
    for (_, probe), (_, wanted) in zip(votes, alone, strict=True):
        assert len(probe.seen) == len(wanted.seen) == 3
        for logits, expected in zip(probe.seen, wanted.seen, strict=True):
            assert np.allclose(logits, expected, atol=0.05)


def test_a_batch_is_never_overfilled(tiny: Path) -> None:
    backend = tiny_backend(tiny)
    backend._llama.begin()
    backend._llama.add([1] * MICRO_BATCH, [1], 0)
    with pytest.raises(AssertionError, match="where a batch ends"):
        backend._llama.add([1], [1], MICRO_BATCH)
    assert backend._llama.filled == MICRO_BATCH
    backend.close()


def crowded(monkeypatch: pytest.MonkeyPatch, backend: GgufBackend) -> None:
    """Every sequence but one has to make room before each step, as where cells are short."""

    def make_room() -> None:
        while len(backend._running) > 1:
            backend._again.append(backend._stop(backend._running[-1]))

    monkeypatch.setattr(backend, "_make_room", make_room)


def long_request(key: int) -> Request:
    return Request(key, (20 + key, 21, 22, 23), Probe([[30]] * (2 + 4 * key)), (2,))  # type: ignore[arg-type]


def test_what_waits_to_begin_again_is_not_left_to_the_next_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_backend(tiny, parallel=3)
    crowded(monkeypatch, backend)
    with closing(backend.generate(iter([long_request(key) for key in range(3)]))) as running:
        assert next(running)[0] == 0  # type: ignore[call-overload]
        assert backend._again and not backend._running
    assert not backend._again
    assert [key for key, _ in backend.generate([long_request(7)])] == [7]
    backend.close()


def test_the_last_request_that_waits_to_begin_again_is_not_lost(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny_backend(tiny, parallel=2)
    crowded(monkeypatch, backend)
    monkeypatch.setattr(backend, "_has_room", lambda request: not backend._running or bool(backend._trunk and more()))
    admitted = iter([True])

    def more() -> bool:
        return next(admitted, False)

    assert sorted(key for key, _ in backend.generate([long_request(0), long_request(1)])) == [0, 1]
    backend.close()


def test_a_judge_closes_in_the_middle_of_many(tiny: Path) -> None:
    pairs = [Pair(f"Is {number} even?", "Yes.", "No.") for number in range(9)]
    with tiny_judge(tiny, parallel=4) as judge:
        verdicts = judge.many(pairs)
        next(verdicts)
    for use in (
        lambda: next(verdicts),
        lambda: judge.with_adapter(None),
        lambda: judge(prompt="q", response_a="x", response_b="y"),
    ):
        with pytest.raises(GramliteError, match="is closed"):
            use()
    verdicts.close()
    judge.close()
