"""The engine: whatever is asked of it at once, each caller gets its own verdicts, in order, none lost and none twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import request_for

import gramlite
from gramlite import Judge, Pair, ResourceError, RuntimeOptions, Settings, Verdict
from gramlite.backends.local import MOST_PASSED
from gramlite.backends.scripted import ScriptedBackend
from gramlite.errors import OutOfMemory
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.generation.scaffold import SMOLLM2
from gramlite.judging.engine import MOST_UNHEARD
from gramlite.judging.open_pair import OpenPair
from gramlite.judging.template import packaged_template

THINK = Settings(budget=64)
TEXTS = {"prompt": "q", "response_a": "x", "response_b": "y"}


def judge_on(backend: ScriptedBackend, settings: Settings = THINK, adapter: str | None = None) -> Judge:
    judge = Judge(backend, packaged_template(), SMOLLM2, settings, {"name": "fake"}, adapter=adapter)
    return judge


def test_threads_and_coroutines_get_their_own_verdicts() -> None:
    judge = judge_on(ScriptedBackend({}, sequences=3, tokens=5))
    texts = [{"prompt": str(n), "response_a": "x", "response_b": "y"} for n in range(16)]
    serial = [judge(**each) for each in texts]
    found: dict[int, Verdict] = {}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: judge(**texts[number])}))  # type: ignore[misc]
        for number in range(16)
    ]
    for thread in threads:
        thread.start()

    async def together() -> list[Verdict]:
        return await asyncio.gather(*(judge.aio(**each) for each in texts))

    assert asyncio.run(together()) == serial
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(16)] == serial


def test_verdicts_may_be_awaited_one_by_one() -> None:
    judge = judge_on(ScriptedBackend({}))
    pairs = [Pair(str(n), "x", "y") for n in range(5)] + [Pair("q", "", "")]
    heard: list[str] = []

    async def collect() -> list[Verdict]:
        return [verdict async for verdict in judge.many(pairs, on_text=lambda order, text: heard.append(text))]

    found = asyncio.run(collect())
    assert found == list(judge.many(pairs)) and heard and found[-1].winner is None


def test_a_coroutine_that_is_cancelled_leaves_the_queue() -> None:
    class Slow(ScriptedBackend):
        def _run(self, request: Request) -> Generation:
            release.wait(10)
            return super()._run(request)

    release = threading.Event()
    judge = judge_on(Slow({}))

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(judge.aio(**TEXTS), 0.05)

    asyncio.run(give_up())
    release.set()
    assert judge(**TEXTS).winner
    judge.close()
    assert not judge._engine._pairs


def test_a_listener_that_does_not_listen_loses_its_stream_and_keeps_nobody_waiting() -> None:
    rationale = "words " + " ".join(str(number) for number in range(2 * MOST_UNHEARD)) + "</think>"
    judge = judge_on(ScriptedBackend({"rationale": rationale}, tokens=5), Settings(budget=1 << 15, orders="ab"))
    listening, over = threading.Event(), threading.Event()
    heard: list[str] = []

    def stall(order: str, text: str) -> None:
        heard.append(text)
        listening.set()
        assert over.wait(30)

    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(judge(**TEXTS, on_text=stall)))
    thread.start()
    assert listening.wait(10)
    assert judge(**TEXTS).winner, "others are judged meanwhile"
    over.set()
    thread.join(30)
    assert found[0].winner and found[0].rationale and "".join(heard).startswith("words")
    assert len("".join(heard)) < len(found[0].rationale), "the rest of the stream is lost"


def test_where_memory_runs_out_and_nothing_is_below_those_that_ran_fail_and_others_go_on() -> None:
    judge = judge_on(ScriptedBackend({}, tokens=5, full_at={2, 3}, places=1))
    with pytest.raises(ResourceError, match="step 3"):
        judge(**TEXTS)
    assert judge(**TEXTS).winner


def test_an_error_of_one_start_fails_that_one_alone() -> None:
    class Picky(ScriptedBackend):
        def start(self, request: Request) -> bool:
            if b"\nrefused\n" in bytes(token for token in request.prompt if token < 256):
                raise ResourceError("too bad")
            return super().start(request)

    judge = judge_on(Picky({}))
    good = judge.many([Pair(str(n), "x", "y") for n in range(4)])
    assert next(good).winner
    with pytest.raises(ResourceError, match="too bad"):
        judge(prompt="q", response_a="refused", response_b="y")
    assert len(list(good)) == 3


def test_what_is_asked_after_a_stop_is_not_stopped() -> None:
    judge = judge_on(ScriptedBackend({}, tokens=5))
    for _ in range(3):
        judge.abort()
        assert judge(**TEXTS).winner
    threads = [threading.Thread(target=judge.abort) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert judge(**TEXTS).winner


def test_a_fault_of_a_pair_is_told_to_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_on(ScriptedBackend({}))
    with monkeypatch.context() as patch:
        patch.setattr(OpenPair, "settled", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            judge(**TEXTS)
    assert judge(**TEXTS).winner


def test_what_waits_for_room_is_not_passed_for_ever() -> None:
    backend = ScriptedBackend({}, sequences=2, cells=100)
    assert backend.start(request_for(0, [1] * 60)) and not backend.start(request_for(1, [1] * 90))
    for key in range(2, 2 + MOST_PASSED):
        assert backend.start(request_for(key, [1] * 20)), "what is smaller goes past it"
        backend.cancel(key)
    assert not backend.start(request_for(99, [1] * 20)), "but not without end"
    assert [event.key for event in backend.step(0)] == [0]
    assert backend.start(request_for(1, [1] * 90)) and not backend.start(request_for(99, [1] * 20))
    assert [event.key for event in backend.step(0)] == [1]
    assert backend.start(request_for(99, [1] * 20))


def test_a_step_that_waits_is_woken() -> None:
    backend = ScriptedBackend({})
    timer = threading.Timer(0.05, backend.wake)
    timer.start()
    assert backend.step(30) == []
    timer.join()


def test_memory_that_runs_out_is_an_error_of_the_step() -> None:
    backend = ScriptedBackend({}, full_at={1})
    assert backend.start(request_for(0, [1, 2]))
    with pytest.raises(OutOfMemory):
        backend.step(0)
    assert not backend._running and not backend.step_down()


ENDING = """
import sys, threading, time
sys.path.insert(0, {tests!r})
import gramlite
judge = gramlite.load(sys.argv[1])
def work():
    try:
        list(judge.many(gramlite.Pair(str(n), "x", "y") for n in range(999)))
    except gramlite.GramliteError:
        pass
threading.Thread(target=work, daemon=True).start()
time.sleep(1)
"""


def test_a_process_ends_while_its_engine_judges(scripted: Path) -> None:
    slow = scripted.read_text().replace('"format"', '"seconds": 0.2, "format"')
    scripted.write_text(slow)
    code = ENDING.format(tests=str(Path(__file__).parents[1]))
    finished = subprocess.run([sys.executable, "-c", code, str(scripted)], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0 and finished.stderr == ""


# ---------------------------------------------------------------- the reference judge
@pytest.fixture(scope="module")
def judge(reference_q8: Path) -> Iterator[Judge]:
    runtime = RuntimeOptions(device="cpu", context=4096)
    with gramlite.load(reference_q8, settings=Settings(budget=16), runtime=runtime) as one:
        yield one


def check_beside(judge: Judge, callers: int) -> None:
    """Direct verdicts are those of a judge that nobody else asks, bit for bit, while others think."""
    texts = [{"prompt": f"Is {n} even?", "response_a": "Yes." + "!" * n, "response_b": "No."} for n in range(callers)]
    direct = judge.with_settings(mode="direct")
    serial = [direct(**each) for each in texts]
    found: dict[int, Verdict] = {}
    thought: dict[int, Verdict] = {}

    def work(number: int) -> None:
        found[number] = direct(**texts[number])
        thought[number] = judge(**texts[number])

    async def together() -> list[Verdict]:
        return await asyncio.gather(*(direct.aio(**each) for each in texts))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    awaited = asyncio.run(together())
    for thread in threads:
        thread.join()
    for number, alone in enumerate(serial):
        for verdict in (found[number], awaited[number]):
            assert [order.margin for order in verdict.orders] == [order.margin for order in alone.orders]
        assert thought[number].winner and thought[number].orders[0].tokens["generated"]


def test_direct_verdicts_beside_thinking_ones_are_those_of_a_judge_alone(judge: Judge) -> None:
    check_beside(judge, 3)


@pytest.mark.slow
def test_sixteen_threads_and_coroutines_on_the_reference_judge(judge: Judge) -> None:
    check_beside(judge, 16)
