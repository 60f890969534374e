from __future__ import annotations

import gc
import json
import math
import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from fakes import generation as made

import gramlite
from gramlite import GramliteError, InputError, ModelError, Pair, Settings
from gramlite.backends.scripted import ScriptedBackend
from gramlite.generation.decoder import Generation, softmax_first
from gramlite.generation.request import Request
from gramlite.generation.scaffold import SMOLLM2
from gramlite.judging.judge import Judge, mean_log_odds
from gramlite.judging.template import packaged_template
from gramlite.judging.verdicts import MOST_READY


class Recording(ScriptedBackend):
    """A scripted backend that keeps what it was asked and may be told each margin."""

    def __init__(self, margins: Iterable[float] = ()) -> None:
        super().__init__({})
        self.requests: list[Request] = []
        self.margins = list(margins)

    def _run(self, request: Request) -> Generation:
        self.requests.append(request)
        generation = super()._run(request)
        if not self.margins:
            return generation
        return made(self.margins.pop(0))


def judge_on(backend: ScriptedBackend, **settings: object) -> Judge:
    return Judge(backend, packaged_template(), SMOLLM2, Settings(**settings), {"name": "fake"})  # type: ignore[arg-type]


def test_orders_are_un_swapped_and_averaged() -> None:
    backend = Recording([2.0, 1.0])  # the second order shows B first, so its margin favours B
    verdict = judge_on(backend, mode="direct")(prompt="q", response_a="x", response_b="y")
    first, second = verdict.orders
    assert (first.order, first.margin, first.verdict) == ("ab", 2.0, "A")
    assert (second.order, second.margin, second.verdict) == ("ba", -1.0, "B")
    assert verdict.p_a == pytest.approx((softmax_first(2) + softmax_first(-1)) / 2, abs=1e-6)
    assert verdict.margin == pytest.approx(math.log(verdict.p_a / (1 - verdict.p_a)), abs=1e-4)
    assert verdict.winner == "A" and verdict.consistent is False
    text = [bytes(token for token in request.prompt if token < 256).decode() for request in backend.requests]
    assert "Assistant A's Response]\nx\n" in text[0] and "Assistant A's Response]\ny\n" in text[1]


def test_votes_are_averaged_within_an_order() -> None:
    backend = Recording([1.0, -1.0, 3.0, 1.0, 1.0, 1.0])
    verdict = judge_on(backend, votes=3, early_stop=False)(prompt="q", response_a="x", response_b="y")
    first, second = verdict.orders
    assert first.votes == {"A": 2, "B": 1}
    assert first.p_a == pytest.approx(sum(map(softmax_first, (1, -1, 3))) / 3, abs=1e-6)
    assert second.votes == {"A": 0, "B": 3} and second.margin == pytest.approx(-1.0)
    seeds = [request.seed for request in backend.requests]
    assert len(set(seeds)) == 6 and all(request.temperature == 0.75 for request in backend.requests)


def test_mean_log_odds_is_exact_far_out() -> None:
    assert mean_log_odds([2.5]) == 2.5
    assert mean_log_odds([800.0, 800.0]) == pytest.approx(800)
    assert mean_log_odds([40.0, -40.0]) == pytest.approx(0, abs=1e-12)
    mean = (softmax_first(0.3) + softmax_first(-2)) / 2
    assert mean_log_odds([0.3, -2.0]) == pytest.approx(math.log(mean / (1 - mean)))


def test_one_order_has_no_consistency() -> None:
    verdict = judge_on(Recording(), orders="ab", mode="direct")(prompt="q", response_a="x", response_b="y")
    assert verdict.consistent is None and len(verdict.orders) == 1


def test_what_is_settled_without_the_model() -> None:
    backend = Recording()
    judge = judge_on(backend)
    verdict = judge(prompt="q", response_a="same", response_b="same")
    assert verdict.winner == "tie" and verdict.p_a == 0.5 and not backend.requests
    empty = judge(prompt="q", response_a="", response_b="y")
    assert "empty:response_a" in empty.flags and empty.winner in ("A", "B")
    with pytest.raises(InputError, match="both responses are empty"):
        judge(prompt="q", response_a="", response_b=" ")


def test_many_goes_on_after_a_bad_pair_and_keeps_the_order() -> None:
    pairs = [
        Pair("q", "x", "y", id="0"),
        Pair("q", "", "", id="1"),
        Pair("q", "s", "s", id="2"),
        Pair("\ud800", "x", "y", id="3"),
    ]
    verdicts = list(judge_on(Recording()).many([*pairs, Pair("q", "x", "z", id="4")]))
    assert [verdict.id for verdict in verdicts] == ["0", "1", "2", "3", "4"]
    assert [verdict.winner is None for verdict in verdicts] == [False, True, False, True, False]
    assert "surrogate" in (verdicts[3].reason or "")


def test_a_prompt_beyond_the_context_is_refused_before_decoding() -> None:
    backend = Recording()
    backend.context = 2000
    with pytest.raises(InputError, match=r"\d,\d{3} \+ 1,0\d\d tokens exceed the context of 2,000"):
        judge_on(backend)(prompt="q " * 600, response_a="x", response_b="y")
    assert not backend.requests


def test_a_failed_generation_names_the_model() -> None:
    backend = Recording()
    backend._run = lambda request: made(reason="the model's logits are not finite")  # type: ignore[method-assign]
    verdict = judge_on(backend)(prompt="q", response_a="x", response_b="y")
    assert verdict.winner is None and "not finite (fake)" in (verdict.reason or "")


def test_what_both_orders_share_is_offered_for_reuse() -> None:
    backend = Recording()
    judge_on(backend, mode="direct")(prompt="a long question", response_a="x", response_b="y")
    first, second = backend.requests
    assert first.splits == second.splits and len(first.splits) == 2
    shared = bytes(token for token in first.prompt[: first.splits[1]] if token < 256).decode()
    assert shared.endswith("a long question\n\n[The Start of Assistant A's Response]\n")
    fixed = bytes(token for token in first.prompt[: first.splits[0]] if token < 256).decode()
    assert fixed.endswith("[User Question]\n")


def test_the_settings_hash_follows_what_a_verdict_depends_on() -> None:
    base = judge_on(Recording())
    assert base.settings_hash == judge_on(Recording()).settings_hash and len(base.settings_hash) == 12
    changes = [
        {"mode": "direct"},
        {"budget": 5},
        {"votes": 2},
        {"orders": "ab"},
        {"delimiters": "flag"},
        {"temperature": 1.0},
    ]
    hashes = {base.with_settings(**change).settings_hash for change in changes}
    assert len(hashes) == len(changes) and base.settings_hash not in hashes
    assert base.with_settings(seed=5).settings_hash == base.settings_hash, "a greedy judge has no use for a seed"


@pytest.mark.parametrize(
    "bad",
    [
        {"votes": 0},
        {"budget": 0},
        {"temperature": -1.0},
        {"votes": 2, "mode": "direct"},
        {"votes": 2, "temperature": 0.0},
    ],
)
def test_settings_that_make_no_sense(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Settings(**bad)  # type: ignore[arg-type]


def test_many_threads_get_what_one_would() -> None:
    judge = judge_on(ScriptedBackend({}))
    texts = [str(n) for n in range(40)]
    serial = [judge(prompt=text, response_a="x", response_b="y") for text in texts]
    results: dict[int, list[object]] = {}

    def work(number: int) -> None:
        results[number] = [judge(prompt=text, response_a="x", response_b="y") for text in texts]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[number] == serial for number in range(8))


def test_a_judge_in_the_middle_of_many_may_be_asked() -> None:
    judge = judge_on(Recording())
    running = judge.many([Pair("q", "x", "y"), Pair("r", "x", "y")])
    first = next(running)
    assert judge(prompt="q", response_a="x", response_b="y") == first
    assert next(running).winner and next(running, None) is None


def test_without_lookahead_a_pair_is_read_only_when_the_last_is_done() -> None:
    read: list[str] = []

    def pairs() -> Iterator[Pair]:
        for name in "abc":
            read.append(name)
            yield Pair(name, "x", "y")

    verdicts = judge_on(Recording()).many(pairs(), lookahead=False)
    next(verdicts)
    assert read == ["a"]


class Held(ScriptedBackend):
    """Ends nothing before it may."""

    def __init__(self) -> None:
        super().__init__({})
        self.may_end = threading.Event()

    def _run(self, request: Request) -> Generation:
        assert self.may_end.wait(20)
        return super()._run(request)


def counted(pairs: Iterable[Pair], read: list[str | None]) -> Iterator[Pair]:
    for pair in pairs:
        read.append(pair.id)
        yield pair


SAME = [Pair("q", "s", "s", id=str(number)) for number in range(2 * MOST_READY)]


def test_what_is_settled_without_the_model_comes_out_before_more_is_read() -> None:
    read: list[str | None] = []
    pairs = [*SAME[:3], Pair("q", "", "", id="refused"), Pair("q", "x", "y", id="asked"), *SAME[5:]]
    verdicts = judge_on(Recording()).many(counted(pairs, read))
    for number, verdict in enumerate(verdicts):
        assert verdict.id == pairs[number].id
        if number < 4:
            assert len(read) == number + 1
    assert len(read) == len(pairs)


def test_few_verdicts_wait_for_one_that_takes_long() -> None:
    read: list[str | None] = []
    pairs = [Pair("q", "x", "y", id="asked"), *SAME]
    backend = Held()
    verdicts = judge_on(backend).many(counted(pairs, read))
    waiting = threading.Thread(target=lambda: read.append(next(verdicts).id))
    waiting.start()
    while len(read) < MOST_READY:
        waiting.join(0.01)
    waiting.join(0.2)
    assert MOST_READY <= len(read) <= MOST_READY + 2
    backend.may_end.set()
    waiting.join()
    assert read.pop() == "asked"
    assert [verdict.id for verdict in verdicts] == [pair.id for pair in SAME]


def test_a_stop_is_heard_where_nothing_is_asked_of_the_model() -> None:
    judge = judge_on(Recording())

    def pairs() -> Iterator[Pair]:
        for number, pair in enumerate(SAME):
            if number == 5:
                judge.abort()
            yield pair

    with pytest.raises(GramliteError, match="stopped"):
        list(judge.many(pairs()))
    assert len(list(judge.many(SAME[:9]))) == 9, "it goes on as if nothing had happened"


def test_memory_does_not_grow_over_a_long_batch() -> None:
    judge = judge_on(ScriptedBackend({}), mode="direct", orders="ab")
    verdicts = judge.many(Pair(f"q{n}", "x", "y") for n in range(6000))
    sizes = {}
    tracemalloc.start()
    for number, _ in enumerate(verdicts):
        if number in (1500, 5900):
            gc.collect()
            sizes[number] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sizes[5900] - sizes[1500] < 30_000, "a leak of one object a row would be over 200,000 bytes"


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at"):
        gramlite.load(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is empty"):
        gramlite.load(tmp_path)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="pickle"):
        gramlite.load(pickle)
    unknown = tmp_path / "x.json"
    unknown.write_text(json.dumps({"format": "nothing"}))
    with pytest.raises(ModelError, match="No backend runs"):
        gramlite.load(unknown)


def test_the_public_names_are_what_they_are() -> None:
    assert sorted(gramlite.__all__) == [
        "GramliteError", "InputError", "IntegrityError", "Judge", "ModelError", "OrderVerdict", "Pair", "ResourceError",
        "RuntimeOptions", "Settings", "Verdict", "load",
    ]  # fmt: skip
