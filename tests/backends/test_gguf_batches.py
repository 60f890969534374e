"""Batches that stay within llama.cpp's arrays, and what a run that ends early leaves to the next one."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from fakes import request_for

from gramlite import GramliteError, Pair
from gramlite.backends.gguf.context import LlamaContext
from gramlite.generation.request import Request

from .conftest import Probe, run_probes, tiny_backend, tiny_judge

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
        votes.append((request_for(key, prompt, (30,)), probe))
    return votes


def test_votes_that_close_together_take_as_many_batches_as_they_need(tiny: Path, sizes: list[int]) -> None:
    together = tiny_backend(tiny, parallel=64)
    votes = closing_votes(64)
    assert sorted(key for key, _ in run_probes(together, votes)) == list(range(64))
    together.close()
    assert sizes[1:3] == [510, 130], "51 votes, then the other 13"
    one_by_one = tiny_backend(tiny)
    alone = closing_votes(64)
    run_probes(one_by_one, alone)
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


def test_what_has_to_make_room_starts_again_and_ends_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence but one has to make room before each step, as where cells are short."""
    backend = tiny_backend(tiny, parallel=3)
    stopped: list[int] = []

    def make_room() -> None:
        while len(backend._sequences) > 1:
            stopped.append(backend._sequences[-1].request.key)
            backend._again.append(backend._sequences[-1].request)
            backend._stop(backend._sequences[-1])

    monkeypatch.setattr(backend, "_make_room", make_room)
    requests = [(request_for(key, (20 + key, 21, 22, 23), (2,)), Probe([[30]] * (2 + 4 * key))) for key in range(3)]
    assert sorted(key for key, _ in run_probes(backend, requests)) == [0, 1, 2]
    assert set(stopped) == {1, 2} and not backend._running
    assert [len(probe.seen) for _, probe in requests] == [3, 7, 11], "what was seen before a restart does not count"
    assert [key for key, _ in run_probes(backend, [(request_for(7, (27, 21, 22, 23), (2,)), Probe())])] == [7]
    backend.close()


def test_a_prompt_that_is_cancelled_half_way_leaves_the_trunk_as_it_was(tiny: Path) -> None:
    backend = tiny_backend(tiny, context=4096)
    long = request_for(0, (11,) * 1500, (1200,), group="a")
    assert backend.start(long) and backend.step(0) == [] and backend.step(0) == []
    backend.cancel(0)
    assert not backend._running and len(backend._free) == 1
    probes = [(request_for(key, (*(11,) * 100, 12 + key), (100,), group="b"), Probe()) for key in range(2)]
    run_probes(backend, probes)
    fresh = tiny_backend(tiny, context=4096)
    wanted = [(request, Probe()) for request, _ in probes]
    run_probes(fresh, wanted)
    for (_, probe), (_, expected) in zip(probes, wanted, strict=True):
        assert np.array_equal(probe.seen[0], expected.seen[0])
    backend.close()
    fresh.close()


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
