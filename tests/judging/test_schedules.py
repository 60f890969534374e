"""Random schedules: callers of every kind at once, over a backend that is short of everything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging.test_engine import TEXTS, judge_on

import gramlite
from gramlite import GramliteError, Judge, Pair, RuntimeOptions, Settings, Verdict
from gramlite.backends.scripted import ScriptedBackend

PROMPT = 1100  # tokens of the longest prompt here, a byte each


def told(verdict: Verdict) -> tuple[Any, ...]:
    return verdict.id, verdict.winner, verdict.margin, [(order.order, order.margin) for order in verdict.orders]


@dataclass(frozen=True)
class Asking:
    """What one caller asks for: pairs from its own thread, closed after so many verdicts, with a listener or none."""

    pairs: int
    votes: int
    mode: Any
    adapter: str | None
    lookahead: bool
    closes_after: int | None
    listens: bool

    def judge(self, judge: Judge) -> Judge:
        asked = judge.with_settings(votes=self.votes, mode="think" if self.votes > 1 else self.mode)
        asked.adapter = self.adapter
        return asked

    def texts(self, name: str) -> list[Pair]:
        kinds = [("x", "y"), ("same", "same"), ("", ""), ("long " * 20, "y")]
        return [Pair(f"{name} {n}", *kinds[(n * n + self.pairs) % 4], id=f"{name}:{n}") for n in range(self.pairs)]


ASKING = st.builds(
    Asking,
    pairs=st.integers(0, 6),
    votes=st.sampled_from([1, 1, 2, 5]),
    mode=st.sampled_from(["think", "direct"]),
    adapter=st.sampled_from([None, None, "one", "two"]),
    lookahead=st.booleans(),
    closes_after=st.sampled_from([None, None, 0, 2]),
    listens=st.booleans(),
)


@dataclass(frozen=True)
class Room:
    """What a backend has room for, and the steps at which its memory runs out."""

    sequences: int
    cells: int
    tokens: int
    full_at: frozenset[int]

    def backend(self) -> ScriptedBackend:
        return ScriptedBackend(
            {}, sequences=self.sequences, cells=self.cells, tokens=self.tokens, full_at=self.full_at,
            places=len(self.full_at), adapters=True,
        )  # fmt: skip


ROOM = st.builds(
    Room,
    sequences=st.integers(1, 5),
    cells=st.integers(PROMPT + 200, 4 * PROMPT),
    tokens=st.sampled_from([1, 7, 1 << 20]),
    full_at=st.frozensets(st.integers(1, 40), max_size=4),
)


def run_schedule(room: Room, callers: list[Asking], ends: Callable[[Judge], None] | None = None) -> None:
    """Let callers ask at the same time; with `ends` somebody stops or closes the judge meanwhile."""
    calm = judge_on(ScriptedBackend({}, adapters=True))
    wanted = [
        [told(verdict) for verdict in asking.judge(calm).many(asking.texts(str(number)))]
        for number, asking in enumerate(callers)
    ]
    judge = judge_on(room.backend())
    found: list[list[Any]] = [[] for _ in callers]
    heard: list[dict[tuple[int, str], str]] = [{} for _ in callers]
    raised: list[BaseException] = []

    def work(number: int) -> None:
        asking, texts = callers[number], heard[number]

        def listen(order: str, text: str) -> None:
            place = len(found[number]), order
            texts[place] = texts.get(place, "") + text

        try:
            verdicts = asking.judge(judge).many(
                asking.texts(str(number)), lookahead=asking.lookahead, on_text=listen if asking.listens else None
            )
            with closing(verdicts):
                while asking.closes_after is None or len(found[number]) < asking.closes_after:
                    found[number].append(told(next(verdicts)))
        except StopIteration:
            pass
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(callers))]
    for thread in threads:
        thread.start()
    if ends:
        ends(judge)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a caller waits for ever"
    for asking, got, right in zip(callers, found, wanted, strict=True):
        whole = asking.closes_after is None and not ends
        assert got == (right if whole else right[: len(got)])
    assert all(isinstance(error, GramliteError) and ends for error in raised), raised
    for texts in heard:
        assert all(text.startswith("Feedback:\nfine"[: len(text)]) for text in texts.values())
    if not ends:
        assert judge(**TEXTS).winner, "it goes on"
    judge.close()
    assert not judge._engine._pairs and not judge._engine._started


@given(ROOM, st.lists(ASKING, min_size=1, max_size=5))
@settings(max_examples=100)
def test_random_schedules_lose_double_and_reorder_nothing(room: Room, callers: list[Asking]) -> None:
    run_schedule(room, callers)


@pytest.mark.slow
@given(ROOM, st.lists(ASKING, min_size=1, max_size=5))
@settings(max_examples=1000)
def test_a_thousand_random_schedules(room: Room, callers: list[Asking]) -> None:
    run_schedule(room, callers)


@given(ROOM, st.lists(ASKING, min_size=1, max_size=4), st.sampled_from([Judge.abort, Judge.close]))
@settings(max_examples=40)
def test_random_schedules_may_be_stopped_and_closed(
    room: Room, callers: list[Asking], ends: Callable[[Judge], None]
) -> None:
    run_schedule(room, callers, ends)


@pytest.fixture(scope="module")
def judge(reference_q8: Path) -> Iterator[Judge]:
    runtime = RuntimeOptions(device="cpu", context=4096)
    with gramlite.load(reference_q8, settings=Settings(budget=16), runtime=runtime) as one:
        yield one


@pytest.mark.slow
@given(st.lists(ASKING, min_size=2, max_size=4))
@settings(max_examples=20)
def test_random_schedules_on_the_reference_judge(judge: Judge, callers: list[Asking]) -> None:
    found: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        asking = callers[number]
        asked = judge.with_settings(votes=asking.votes, mode="think" if asking.votes > 1 else asking.mode)
        verdicts = asked.many(asking.texts(str(number))[:3], lookahead=asking.lookahead)
        with closing(verdicts):
            most = 9 if asking.closes_after is None else asking.closes_after
            found[number] = [verdict for _, verdict in zip(range(most), verdicts, strict=False)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, asking in enumerate(callers):
        pairs = asking.texts(str(number))[:3]
        if asking.closes_after is not None:
            pairs = pairs[: asking.closes_after]
        assert [verdict.id for verdict in found[number]] == [pair.id for pair in pairs]
        assert all(verdict.winner or pair.response_a == "" for verdict, pair in zip(found[number], pairs, strict=True))
