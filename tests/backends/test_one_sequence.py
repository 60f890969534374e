"""The loop of backends that run one request at a time, on a model that only writes down what it is fed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from fakes import END, FakeVocabulary, logits_for, request_for, run_all

from gramlite.backends.fallback import Fallback
from gramlite.backends.one_sequence import OneSequenceBackend
from gramlite.errors import GramliteError
from gramlite.generation.decoder import AnswerForm, Generation
from gramlite.generation.request import Request
from gramlite.runtime.options import PIECE
from gramlite.runtime.placement import Placement

DIRECT = AnswerForm(opening="", closing="", answer="")
THINK = AnswerForm(opening="<", closing=">", answer="=")


class Recorder(OneSequenceBackend):
    """A cache of tokens; what it says next depends on all of them. `calls` are the (position, length) it was fed."""

    vocabulary = FakeVocabulary()

    def __init__(self, script: Sequence[int] = ()) -> None:
        super().__init__()
        self._fallback = Fallback(
            Placement(None, 4096), load=lambda place: None, free=lambda: None, below=lambda place, context: None
        )
        self.cache: list[int] = []
        self.calls: list[tuple[int, int]] = []
        self.script = list(script)

    def _compute(self, tokens: Sequence[int], position: int) -> np.ndarray:
        assert position <= len(self.cache), "a hole in the cache"
        self.calls.append((position, len(tokens)))
        self.cache[position:] = tokens
        if self.script:
            return logits_for(self.script.pop(0))
        return logits_for(END, A=float(sum(index * token for index, token in enumerate(self.cache, 1)) % 97), B=0.0)

    def close(self) -> None:
        pass


def request(key: int, prompt: Iterable[int], splits: tuple[int, ...] = (), form: AnswerForm = DIRECT) -> Request:
    return request_for(key, prompt, splits, form=form, budget=8)


def run_one(model: Recorder, asked: Request) -> Generation:
    ((_, generation),) = run_all(model, [asked])
    return generation


def test_stretches_between_splits_are_computed_apart_and_kept_whole() -> None:
    model = Recorder()
    first, second, third = [*range(10), 50], [*range(10), 60, 61], [*range(5), 70]
    assert [key for key, _ in run_all(model, [request(0, first, (4, 8)), request(1, second, (4, 8))])] == [0, 1]
    assert model.calls == [(0, 4), (4, 4), (8, 3), (8, 4)]
    generation = run_one(model, request(2, third, (4,)))
    assert model.calls[4:] == [(4, 2)] and generation.cached == 4
    again = run_one(model, request(3, first, (4, 8)))
    assert model.calls[5:] == [(4, 4), (8, 3)] and again.cached == 4


def test_what_was_judged_before_changes_nothing() -> None:
    prompts = [([*range(20), key], (6, 15)) for key in range(3)] + [([9, 9, 9, 1], (2,)), ([*range(7), 3], (6,))]
    alone = {}
    for key, (prompt, splits) in enumerate(prompts):
        model = Recorder()
        alone[key] = run_one(model, request(key, prompt, splits)).reads
    model = Recorder()
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 2, 1], [1, 1, 0, 4, 4]):
        for key, generation in run_all(model, [request(key, *prompts[key]) for key in order]):
            assert generation.reads == alone[key]


def test_a_border_that_was_not_one_before_is_not_reused() -> None:
    model = Recorder()
    run_all(model, [request(0, range(10), (8,)), request(1, range(10), (4,))])
    assert model.calls == [(0, 8), (8, 2), (0, 4), (4, 6)]


def test_long_prompts_go_in_pieces() -> None:
    model = Recorder()
    run_all(model, [request(0, [7] * (2 * PIECE + 5))])
    assert model.calls == [(0, PIECE), (PIECE, PIECE), (2 * PIECE, 5)]


def test_thinking_feeds_what_the_decoder_asks_for_and_leaves_the_prompt_in_the_cache() -> None:
    model = Recorder([0, ord("x"), ord(">")])  # the first is said after the stretch up to the split, and not asked for
    prompt = [1, 2, 3, ord("<")]
    generation = run_one(model, request(0, prompt, (3,), THINK))
    assert generation.thinking == "x" and not generation.forced
    assert model.cache == [*prompt, ord("x"), ord(">"), ord("=")]
    run_one(model, request(1, prompt, (3,), THINK))
    assert min(position for position, _ in model.calls[4:]) == 3, "the kept stretch is not computed again"


def test_abort_stops_between_two_pieces_and_the_next_request_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorder()
    compute = model._compute

    def slow(tokens: Sequence[int], position: int) -> np.ndarray:
        model.abort()
        return compute(tokens, position)

    monkeypatch.setattr(model, "_compute", slow)
    with pytest.raises(GramliteError, match="stopped"):
        run_one(model, request(0, [5] * (PIECE + 1), (PIECE,)))
    assert len(model.calls) == 1
    monkeypatch.setattr(model, "_compute", compute)
    assert run_one(model, request(1, [5] * (PIECE + 1), (PIECE,))).cached == 0


def test_after_a_failure_nothing_is_taken_for_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorder([*range(5)])
    compute = model._compute

    def failing(tokens: Sequence[int], position: int) -> np.ndarray:
        if len(model.calls) == 3:
            model.cache.clear()
            raise GramliteError("out of order")
        return compute(tokens, position)

    monkeypatch.setattr(model, "_compute", failing)
    prompt = [*range(10), 50]
    with pytest.raises(GramliteError, match="out of order"):
        run_one(model, request(0, prompt, (4,), THINK))
    monkeypatch.setattr(model, "_compute", compute)
    again = run_one(model, request(1, prompt, (4,)))
    assert again.cached == 0 and model.calls[3:] == [(0, 4), (4, 7)]


def test_a_request_that_is_cancelled_half_way_leaves_nothing_wrong_behind() -> None:
    model = Recorder()
    assert model.start(request(0, [5] * (PIECE + 1))) and not model.start(request(1, [6]))
    assert model.step(0) == []
    model.cancel(0)
    wanted = run_one(Recorder(), request(2, [5] * (PIECE + 1))).reads
    assert run_one(model, request(2, [5] * (PIECE + 1))).reads == wanted
