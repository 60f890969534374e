"""A closed judge is never asked again, and never closed under whoever is asking."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fakes import calibration_for

from gramlite import GramliteError, Pair, Settings
from gramlite.backends.scripted import ScriptedBackend
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.generation.scaffold import SMOLLM2
from gramlite.judging.judge import Judge
from gramlite.judging.template import packaged_template
from gramlite.ranking.rank import rank

PAIRS = [Pair(f"q{number}", "x", "y") for number in range(50)]
TEXTS = {"prompt": "q", "response_a": "x", "response_b": "y"}


class Native(ScriptedBackend):
    """Memory that must be there while it is used: `computing` is set meanwhile, and waits for `go_on` or a stop."""

    def __init__(self) -> None:
        super().__init__({})
        self.freed = 0
        self.computing, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def _forget(self) -> None:
        assert not self.freed, "what is computed is given back while there is something to give it to"
        super()._forget()

    def _run(self, request: Request) -> Generation:
        self.computing.set()
        while not self.go_on.wait(0.01):
            assert not self.freed, "freed under whoever is asking"
            self._require_going()
        assert not self.freed, "freed under whoever is asking"
        return super()._run(request)

    def close(self) -> None:
        self.freed += 1


def judge_on(backend: ScriptedBackend) -> Judge:
    return Judge(backend, packaged_template(), SMOLLM2, Settings(mode="direct"), {"name": "fake"}, rank=rank)


def test_a_closed_judge_refuses_every_use() -> None:
    judge = judge_on(Native())
    other = judge.with_settings(seed=3)
    calibration = calibration_for(judge)
    judge.close()
    judge.close()
    for one in (judge, other):
        for use in (
            lambda one=one: one(**TEXTS),
            lambda one=one: list(one.many(PAIRS)),
            lambda one=one: list(one.many([])),
            lambda one=one: one.rank(prompt="q", completions=["x", "y"]),
            lambda one=one: one.with_settings(seed=1),
            lambda one=one: one.calibrated(calibration),
            lambda one=one: one.with_adapter(None),
            lambda one=one: one.grouped(),
        ):
            with pytest.raises(GramliteError, match=r"closed. Load it again with gramlite.load"):
                use()


def test_an_iterator_that_is_not_used_up_ends_with_its_judge() -> None:
    backend = Native()
    with judge_on(backend) as judge:
        verdicts = judge.many(PAIRS)
        assert next(verdicts).winner
    assert backend.freed == 1
    with pytest.raises(GramliteError, match="is closed"):
        next(verdicts)
    again = judge_on(Native()).many(PAIRS)
    next(again)
    again.close()


def test_an_error_in_the_middle_of_a_pair_does_not_keep_the_judge_from_closing() -> None:
    def broken() -> Iterator[Pair]:
        yield PAIRS[0]
        raise KeyboardInterrupt

    backend = Native()
    with pytest.raises(KeyboardInterrupt), judge_on(backend) as judge:
        list(judge.many(broken()))
    assert backend.freed == 1


@pytest.mark.parametrize("begun", [True, False])
def test_closing_stops_another_thread_and_waits_for_it(begun: bool) -> None:
    backend = Native()
    judge = judge_on(backend)
    backend.go_on.clear()
    raised: list[str] = []

    def work() -> None:
        try:
            list(judge.many(PAIRS))
        except GramliteError as error:
            raised.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    if begun:
        assert backend.computing.wait(5)
    judge.close()
    thread.join(5)
    assert not thread.is_alive() and backend.freed == 1 and len(raised) == 1
    assert "stopped" in raised[0] or (not begun and "closed" in raised[0])


def test_closing_does_not_wait_for_an_iterator_that_nobody_asks() -> None:
    judge = judge_on(Native())
    begun, over = threading.Event(), threading.Event()

    def begin() -> None:
        verdicts = judge.many(PAIRS)
        next(verdicts)
        begun.set()
        assert over.wait(10)
        verdicts.close()

    thread = threading.Thread(target=begin)
    thread.start()
    assert begun.wait(5)

    assert judge(**TEXTS).winner, "nor does another call"
    judge.close()
    with pytest.raises(GramliteError, match="is closed"):
        judge(**TEXTS)
    over.set()
    thread.join(5)
    assert not thread.is_alive()


def test_a_judge_is_not_closed_from_inside_its_own_verdict() -> None:
    backend = Native()
    judge = judge_on(backend).with_settings(mode="think")
    with pytest.raises(GramliteError, match="Close it after that"):
        judge(**TEXTS, on_text=lambda order, text: judge.close())
    assert not backend.freed and judge(**TEXTS).winner
