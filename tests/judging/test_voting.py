"""Votes: when they are enough, and that stopping early changes no verdict."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from fakes import calibration_for, generation

from gramlite import InputError, Pair, Settings
from gramlite.backends.scripted import Playing, ScriptedBackend
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.generation.scaffold import SMOLLM2
from gramlite.judging.judge import Judge
from gramlite.judging.open_pair import OpenPair
from gramlite.judging.template import packaged_template
from gramlite.judging.voting import count, least_votes, means_are_fixed, refutes_even_odds, settled, side_of, wanting


class Voting(ScriptedBackend):
    """Runs up to `width` requests at a time; margins are drawn by the request's seed and lean towards the text x."""

    def __init__(self, width: int, lean: float, scale: float = 1.0) -> None:
        super().__init__({}, sequences=width)
        self.lean, self.scale = lean, scale
        self.ran = 0

    def _write(self, one: Playing) -> None:
        if one is self._playing[0]:  # one after another, so that some are still running when a pair is settled
            super()._write(one)

    def _run(self, request: Request) -> Generation:
        self.ran += 1
        return self._vote(request)

    def _vote(self, request: Request) -> Generation:
        text = bytes(token for token in request.prompt if token < 256)
        sign = 1 if text.index(b"\nx\n") < text.index(b"\ny\n") else -1
        margin = self.scale * random.Random(request.seed).gauss(sign * self.lean, 2)
        return generation(margin, thinking="because", generated=1)


def judge_on(backend: ScriptedBackend, **settings: object) -> Judge:
    return Judge(backend, packaged_template(), SMOLLM2, Settings(**settings), {"name": "fake"})  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["unsure", "sure"])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("votes", [2, 3, 8])
def test_stopping_early_changes_no_verdict(votes: int, width: int, scale: float) -> None:
    spent = [
        compare_early_with_all(Voting(width, lean, scale), Voting(width, lean, scale), votes)
        for lean in (0.0, 1.5, 4.0)
    ]
    assert spent[2] < 0.9 * spent[0] if votes == 8 else spent[2] <= spent[0] + 60


@pytest.mark.parametrize("temperature", [0.4, 5.0])
@pytest.mark.parametrize("bias", [-3.0, 1.0])
def test_stopping_early_changes_no_calibrated_verdict(bias: float, temperature: float) -> None:
    for scale in (1.0, 12.0):
        compare_early_with_all(Voting(3, 1.5, scale), Voting(3, 1.5, scale), votes=5, calibration=(temperature, bias))


def compare_early_with_all(
    every: Voting, some: Voting, votes: int, calibration: tuple[float, float] | None = None
) -> int:
    """Judge 60 pairs on either backend, with all votes and stopped early; how many votes the latter took."""
    pairs = [Pair(f"question {number}", "x", "y") for number in range(60)]
    judges = [judge_on(every, votes=votes, early_stop=False), judge_on(some, votes=votes)]
    if calibration:
        judges = [judge.calibrated(calibration_for(judge, *calibration)) for judge in judges]
    whole, early = (judge.many(pairs) for judge in judges)
    for full, short in zip(whole, early, strict=True):
        assert full.winner == short.winner and full.consistent == short.consistent
        for before, after in zip(full.orders, short.orders, strict=True):
            assert before.verdict == after.verdict
            majorities = [order.votes["A"] - order.votes["B"] for order in (before, after)]
            assert majorities[0] * majorities[1] > 0 or majorities[0] == majorities[1] == 0
            assert sum(after.votes.values()) <= sum(before.votes.values()) == votes
    assert every.ran == 2 * votes * len(pairs)
    return some.ran


def test_unanimous_votes_take_the_first_stage_alone() -> None:
    backend = Voting(8, 0.0)
    order = {"x": 9.0, "y": -9.0}
    backend._vote = lambda request: generation(  # type: ignore[method-assign]
        order[bytes(token for token in request.prompt if token < 256).decode().split("A's Response]\n")[1][0]],
        thinking="t",
        generated=1,
    )
    verdict = judge_on(backend, votes=8)(prompt="q", response_a="x", response_b="y")
    assert [sum(order.votes.values()) for order in verdict.orders] == [5, 5] and verdict.winner == "A"


def test_ahead_of_those_that_run_every_vote_is_asked_for_once() -> None:
    one = OpenPair(pair=Pair("q", "x", "y"), settings=Settings(votes=8), prompts={}, answer=None)  # type: ignore[arg-type]
    certain = list(iter(one.next_vote, None))
    ahead = list(iter(lambda: one.next_vote(ahead=True), None))
    assert sorted(certain) == [(order, vote) for order in ("ab", "ba") for vote in range(5)]
    assert sorted(ahead) == [(order, vote) for order in ("ab", "ba") for vote in range(5, 8)]


def odds(shares: Sequence[float]) -> list[float]:
    """The margins in nats of votes that are given as p_a."""
    return [
        math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(math.inf, share - 0.5) for share in shares
    ]


def test_the_mean_is_fixed_exactly_when_no_completion_can_move_it() -> None:
    steps = [0.0, 0.3, 0.5, 0.9, 1.0]
    for spent, votes in ((1, 2), (2, 3), (3, 4), (2, 4)):
        for order in itertools.product(steps, repeat=spent):
            ends = {
                (total > votes / 2) - (total < votes / 2)
                for rest in itertools.product([0.0, 1.0], repeat=votes - spent)
                for total in [round(sum(order) + sum(rest), 9)]
            }
            assert means_are_fixed([odds(order)], votes, [float]) == (len(ends) == 1 and ends != {0}), (order, votes)


def test_a_tie_is_not_settled_before_its_end() -> None:
    assert not settled([odds([1.0, 1.0]), odds([0.0])], 2, None)
    assert count(odds([0.9, 0.1, 0.5])) == (1, 1)


def test_the_sequential_test_keeps_its_level() -> None:
    draw = random.Random(7)
    stopped = 0
    for _ in range(2000):
        votes = [0, 0]
        for _ in range(200):
            votes[draw.random() < 0.5] += 1
            if refutes_even_odds(votes[0], votes[1], 0.95):
                stopped += 1
                break
    assert stopped / 2000 < 0.05
    assert refutes_even_odds(40, 10, 0.95) and not refutes_even_odds(3, 0, 0.95)


def test_no_fewer_votes_than_can_settle() -> None:
    assert least_votes([], 8, None) == 5
    assert least_votes([], 1, None) == 1
    assert least_votes([], 64, 0.95) == 8
    assert refutes_even_odds(8, 0, 0.95) and not refutes_even_odds(7, 0, 0.95)
    assert least_votes(odds([1.0]), 8, None) == 5
    assert least_votes(odds([1.0, 0.0]), 8, None) == least_votes(odds([1.0] * 4 + [0.0]), 8, None) == 6
    assert least_votes(odds([0.0, 0.0, 1.0, 0.0, 1.0]), 8, None) == 7
    assert least_votes(odds([0.0, 1.0] * 3), 8, None) == least_votes(odds([0.0, 1.0] * 4), 8, None) == 8


def test_more_votes_are_asked_where_they_can_change_something() -> None:
    sure, open_, full = odds([1.0] * 5), odds([1.0, 1.0, 1.0, 1.0, 0.0]), odds([1.0, 0.0] * 4)
    assert wanting([sure, open_], 8, None) == [1]
    assert wanting([open_, odds([0.0] * 5)], 8, None) == [0]
    assert wanting([open_, open_], 8, None) == [0, 1]
    assert wanting([full, sure], 8, None) == [1], "a tie stays one, and the pair may still turn"
    assert wanting([sure, odds([0.0] * 5)], 8, None) == [0, 1], "each is sure, the pair is not"
    assert wanting([odds([1.0] * 8), odds([1.0] * 7 + [0.0])], 64, 0.95) == [1]


def test_a_sure_majority_needs_fewer_votes_with_confidence() -> None:
    pairs = [Pair(f"question {number}", "x", "y") for number in range(5)]
    ran = []
    for confidence in (None, 0.95):
        backend = Voting(4, 0.0)
        backend.lean = 0.0
        judge = judge_on(backend, votes=64, confidence=confidence)

        def one_sided(request: Request) -> Generation:
            text = bytes(token for token in request.prompt if token < 256)
            margin = 5.0 if text.index(b"\nx\n") < text.index(b"\ny\n") else -5.0  # for x, wherever it stands
            return generation(margin, thinking="t", generated=1)

        backend._vote = one_sided  # type: ignore[method-assign]
        list(judge.many(pairs))
        ran.append(backend.ran)
    assert ran[1] < ran[0]


def test_orders_decided_for_different_sides_leave_the_pair_open() -> None:
    first, second = [0.2] * 8, [-0.2] * 8
    assert not settled([first, second], 32, 0.95), "the pair would be the sign of a difference that nobody tested"
    assert settled([first, first], 32, 0.95) and settled([second, second], 32, 0.95)
    assert wanting([first, second], 32, 0.95) == [0, 1]
    assert settled([[9.0] * 32, [-0.2] * 20], 32, 0.95), "until the votes to come cannot turn the pair"


def test_a_position_biased_judge_ends_as_with_all_votes() -> None:
    def biased(request: Request) -> Generation:
        draw = random.Random(request.seed)
        return generation(draw.gauss(3, 1), thinking="t", generated=1)

    pairs = [Pair(f"question {number}", "x", "y") for number in range(20)]
    found = []
    for settings in ({"early_stop": False}, {"confidence": 0.95}):
        backend = Voting(4, 0.0)
        judge = judge_on(backend, votes=16, **settings)
        backend._vote = biased  # type: ignore[method-assign]
        found.append([verdict.winner for verdict in judge.many(pairs)])
    assert found[0] == found[1] and set(found[0]) == {"A", "B"}


def test_the_test_counts_what_the_verdict_is_read_from() -> None:
    def less(margin: float) -> float:
        return margin - 3

    votes = [1.0] * 8
    assert settled([votes], 32, 0.95) and side_of(votes, 32, 0.95, float) == 1
    assert side_of(votes, 32, 0.95, less) == -1 and least_votes(votes, 32, 0.95, less) == 8
    mixed = [4.0, 2.0] * 6
    assert side_of(mixed, 64, 0.95, float) == 1
    assert side_of(mixed, 64, 0.95, less) is None, "six votes to six, once rescaled"
    assert least_votes(mixed, 64, 0.95, less) > least_votes(mixed, 64, 0.95) == 12


def test_an_order_whose_mean_is_against_its_majority_is_open() -> None:
    votes = [0.1] * 30 + [-9.0] * 6
    assert refutes_even_odds(*count(votes), 0.95)
    assert side_of(votes, 128, 0.95, float) is None, "the verdict is the mean's, which was not tested"


def test_an_order_with_all_its_votes_is_decided() -> None:
    full = [1.0] * 17 + [-0.5] * 15
    assert not refutes_even_odds(*count(full), 0.95)
    assert settled([full, [1.0] * 8], 32, 0.95), "the other is decided, and for the same side"
    assert not settled([full, [-1.0] * 8], 32, 0.95) and wanting([full, [-1.0] * 8], 32, 0.95) == [1]
    assert settled([odds([1.0, 0.0] * 2 + [0.9]), odds([1.0] * 4)], 5, None)
    assert settled([odds([1.0, 0.0] * 4), odds([1.0] * 5)], 8, None), "a tie stays one, and the pair cannot turn"


def test_confidence_without_votes_is_refused() -> None:
    with pytest.raises(InputError, match="--confidence"):
        Settings(confidence=0.95)
    with pytest.raises(InputError, match="--confidence"):
        Settings(votes=4, early_stop=False, confidence=0.95)
