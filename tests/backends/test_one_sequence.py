"""The loop of backends that run one request at a time, on a model that only writes down what it is fed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from fakes import END, FakeVocabulary, logits_for

from gramlite.backends.one_sequence import PIECE, OneSequence
from gramlite.errors import GramliteError
from gramlite.generation.decoder import AnswerForm, Decoder, Sampling
from gramlite.generation.request import Request

DIRECT = AnswerForm(opening="", closing="", answer="")
THINK = AnswerForm(opening="<", closing=">", answer="=")


class Recorder:
    """A cache of tokens; what it says next depends on all of them. `calls` are the (position, length) it was fed."""

    def __init__(self, script: Sequence[int] = ()) -> None:
        self.cache: list[int] = []
        self.calls: list[tuple[int, int]] = []
        self.script = list(script)

    def compute(self, tokens: Sequence[int], position: int) -> np.ndarray:
        assert position <= len(self.cache), "a hole in the cache"
        self.calls.append((position, len(tokens)))
        self.cache[position:] = tokens
        if self.script:
            return logits_for(self.script.pop(0))
        return logits_for(END, A=float(sum(index * token for index, token in enumerate(self.cache, 1)) % 97), B=0.0)


def request(key: int, prompt: Sequence[int], splits: tuple[int, ...] = (), form: AnswerForm = DIRECT) -> Request:
    mode = "think" if form.thinks else "direct"
    return Request(key, tuple(prompt), Decoder(FakeVocabulary(), form, Sampling(mode=mode, budget=8)), splits)


def test_stretches_between_splits_are_computed_apart_and_kept_whole() -> None:
    model = Recorder()
    sequence = OneSequence(model.compute)
    first, second, third = [*range(10), 50], [*range(10), 60, 61], [*range(5), 70]
    assert [key for key, _ in sequence.generate([request(0, first, (4, 8)), request(1, second, (4, 8))])] == [0, 1]
    assert model.calls == [(0, 4), (4, 4), (8, 3), (8, 4)]
    generation = next(sequence.generate([request(2, third, (4,))]))[1]
    assert model.calls[4:] == [(4, 2)] and generation.cached == 4
    again = next(sequence.generate([request(3, first, (4, 8))]))[1]
    assert model.calls[5:] == [(4, 4), (8, 3)] and again.cached == 4


def test_what_was_judged_before_changes_nothing() -> None:
    prompts = [([*range(20), key], (6, 15)) for key in range(3)] + [([9, 9, 9, 1], (2,)), ([*range(7), 3], (6,))]
    alone = {}
    for key, (prompt, splits) in enumerate(prompts):
        model = Recorder()
        alone[key] = next(OneSequence(model.compute).generate([request(key, prompt, splits)]))[1].margin
    sequence = OneSequence(Recorder().compute)
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 2, 1], [1, 1, 0, 4, 4]):
        for key, generation in sequence.generate(request(key, *prompts[key]) for key in order):
            assert generation.margin == alone[key]


def test_a_border_that_was_not_one_before_is_not_reused() -> None:
    model = Recorder()
    sequence = OneSequence(model.compute)
    list(sequence.generate([request(0, range(10), (8,)), request(1, range(10), (4,))]))
    assert model.calls == [(0, 8), (8, 2), (0, 4), (4, 6)]


def test_long_prompts_go_in_pieces() -> None:
    model = Recorder()
    list(OneSequence(model.compute).generate([request(0, [7] * (2 * PIECE + 5))]))
    assert model.calls == [(0, PIECE), (PIECE, PIECE), (2 * PIECE, 5)]


def test_thinking_feeds_what_the_decoder_asks_for_and_leaves_the_prompt_in_the_cache() -> None:
    model = Recorder([0, ord("x"), ord(">")])  # the first is said after the stretch up to the split, and not asked for
    sequence = OneSequence(model.compute)
    prompt = [1, 2, 3, ord("<")]
    generation = next(sequence.generate([request(0, prompt, (3,), THINK)]))[1]
    assert generation.thinking == "x" and not generation.forced
    assert model.cache == [*prompt, ord("x"), ord(">"), ord("=")]
    next(sequence.generate([request(1, prompt, (3,), THINK)]))
    assert min(position for position, _ in model.calls[4:]) == 3, "the kept stretch is not computed again"


def test_abort_stops_between_two_pieces_and_the_next_request_starts_anew() -> None:
    model = Recorder()
    sequence = OneSequence(model.compute)
    started = threading.Event()

    def slow(tokens: Sequence[int], position: int) -> np.ndarray:
        started.set()
        sequence.abort()
        return model.compute(tokens, position)

    sequence._compute = slow
    with pytest.raises(GramliteError, match="stopped"):
        list(sequence.generate([request(0, [5] * (PIECE + 1), (PIECE,))]))
    assert started.is_set() and len(model.calls) == 1
    sequence._compute = model.compute
    assert next(sequence.generate([request(1, [5] * (PIECE + 1), (PIECE,))]))[1].cached == 0


def test_after_a_failure_nothing_is_taken_for_computed() -> None:
    model = Recorder([*range(5)])
    sequence = OneSequence(model.compute)
    compute = model.compute

    def failing(tokens: Sequence[int], position: int) -> np.ndarray:
        if len(model.calls) == 3:
            model.cache.clear()
            raise GramliteError("out of order")
        return compute(tokens, position)

    sequence._compute = failing
    prompt = [*range(10), 50]
    with pytest.raises(GramliteError, match="out of order"):
        list(sequence.generate([request(0, prompt, (4,), THINK)]))
    sequence._compute = compute
    again = next(sequence.generate([request(1, prompt, (4,))]))[1]
    assert again.cached == 0 and model.calls[3:] == [(0, 4), (4, 7)]
