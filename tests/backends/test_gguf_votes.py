"""Votes on GGUF: one computed prompt for all of them, and cells that make room for one another."""

from __future__ import annotations

from pathlib import Path

import pytest

import gramlite
from gramlite import Judge, RuntimeOptions, Settings
from gramlite.backends.gguf import cells as gguf_cells
from gramlite.backends.gguf.backend import GgufBackend
from gramlite.backends.gguf.context import LlamaContext

PAIR = {"prompt": "Name the capital of Australia.", "response_a": "Canberra.", "response_b": "It is Sydney, I think."}
SCAFFOLD = 12  # tokens, at most, that open and close a rationale


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every batch that is computed."""
    sizes: list[int] = []
    decode = LlamaContext.decode

    def counting(self: LlamaContext) -> None:
        sizes.append(self.filled)
        decode(self)

    monkeypatch.setattr(LlamaContext, "decode", counting)
    return sizes


def voting(model: Path, context: int = 4096, **settings: object) -> Judge:
    runtime = RuntimeOptions(device="cpu", context=context, parallel=4)
    return gramlite.load(model, settings=Settings(**settings), runtime=runtime)  # type: ignore[arg-type]


def test_a_prompt_is_computed_once_for_all_votes(reference_q8: Path, fed: list[int]) -> None:
    with voting(reference_q8, votes=6, budget=24, early_stop=False) as judge:
        judge.backend._drafter = None  # type: ignore[attr-defined]
        verdict = judge(**PAIR)
    prompts = sum(order.tokens["prompt"] - order.tokens["cached"] + SCAFFOLD for order in verdict.orders)
    written = sum(order.tokens["generated"] + 6 * SCAFFOLD for order in verdict.orders)
    assert [sum(order.votes.values()) for order in verdict.orders] == [6, 6]
    assert prompts < sum(fed) <= prompts + written


def test_later_votes_find_their_prompt_again(reference_q8: Path, fed: list[int]) -> None:
    with voting(reference_q8, votes=2, budget=4) as judge:
        verdicts = list(judge.many([gramlite.Pair(**PAIR), gramlite.Pair("Say hello.", "Hello!", "Goodbye.")]))
    prompts = sum(order.tokens["prompt"] - order.tokens["cached"] for each in verdicts for order in each.orders)
    assert sum(size for size in fed if size > 32) <= prompts + 4 * SCAFFOLD


def test_votes_that_say_the_same_are_one(reference_q8: Path, fed: list[int]) -> None:
    steps = {}
    for temperature in (0.01, 5.0):
        fed.clear()
        with voting(reference_q8, votes=4, budget=24, orders="ab", temperature=temperature, early_stop=False) as judge:
            judge.backend._drafter = None  # type: ignore[attr-defined]
            judge(**PAIR)
        steps[temperature] = sum(size for size in fed if size < 32)
    assert steps[0.01] < 0.5 * steps[5.0]


@pytest.mark.slow
def test_where_cells_are_short_votes_start_again(
    reference_q8: Path, monkeypatch: pytest.MonkeyPatch, fed: list[int]
) -> None:
    again = []
    stop = GgufBackend._stop
    monkeypatch.setattr(GgufBackend, "_stop", lambda self, running: (again.append(running), stop(self, running)))
    monkeypatch.setattr(gguf_cells, "LIKELY_TOKENS", 1)
    pairs = [gramlite.Pair(**PAIR), gramlite.Pair("Say hello.", "Hello!", "Goodbye.")]
    verdicts = {}
    for context in (4096, 384):
        again.clear()
        with voting(reference_q8, context, votes=4, budget=80, early_stop=False) as judge:
            verdicts[context] = list(judge.many(pairs))
        assert bool(again) == (context == 384)
    for roomy, tight in zip(verdicts[4096], verdicts[384], strict=True):
        assert [sum(order.votes.values()) for order in tight.orders] == [4, 4]
        for before, after in zip(roomy.orders, tight.orders, strict=True):
            assert after.p_a == pytest.approx(before.p_a, abs=0.3)


@pytest.mark.slow
def test_deterministic_votes_do_not_tell_of_the_pairs_beside_them(reference_q8: Path) -> None:
    settings, runtime = Settings(votes=4, budget=40), RuntimeOptions(device="cpu", context=4096, deterministic=True)
    pairs = [
        gramlite.Pair(**PAIR),
        gramlite.Pair("Say hello.", "Hello!", "Goodbye."),
        gramlite.Pair("1 + 1?", "2", "3"),
    ]
    with gramlite.load(reference_q8, settings=settings, runtime=runtime) as judge:
        together = [[order.margin for order in verdict.orders] for verdict in judge.many(pairs)]
    for pair, wanted in zip(pairs, together, strict=True):
        with gramlite.load(reference_q8, settings=settings, runtime=runtime) as judge:
            (verdict,) = judge.many([pair])
        assert [order.margin for order in verdict.orders] == wanted, "bit for bit"
