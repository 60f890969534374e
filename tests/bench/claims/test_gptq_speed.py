"""The measurement of a GPTQ folder's speed: who takes turns, what is counted, and that gramlite's own calls run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gptq_speed
import pytest
from gptq_speed import Reader

import gramlite
from gramlite.judging.pair import Pair

PROMPTS = [list(range(20)), list(range(30))]
PAIR = Pair("Name a colour.", "Red.", "A horse is an animal.")


def test_readers_take_turns_and_write_behind_what_they_read() -> None:
    heard: list[tuple[str, int]] = []

    def reader(name: str) -> Reader:
        return Reader(
            name,
            lambda tokens: heard.append((f"{name} reads", len(tokens))),
            lambda token, position: heard.append((f"{name} writes", position)),
        )

    readers, said = [reader("a"), reader("b")], []
    gptq_speed.read_and_write(readers, PROMPTS, 2, said.append)
    warm_up = [("a reads", 8), ("a writes", 8), ("b reads", 8), ("b writes", 8)]
    first = [("a reads", 20), ("a writes", 20), ("a writes", 21), ("b reads", 20), ("b writes", 20), ("b writes", 21)]
    second = [("b reads", 30), ("b writes", 30), ("b writes", 31), ("a reads", 30), ("a writes", 30), ("a writes", 31)]
    assert heard == warm_up + first + second
    assert [row["prompt_tokens"] for row in said] == [20, 30]
    assert all(len(each.reading) == len(each.writing) == 2 and min(each.reading) > 0 for each in readers)


def test_tokens_that_were_computed_are_counted(scripted: Path) -> None:
    counts: list[int] = []
    with gramlite.load(scripted) as judge:
        (verdict,) = gptq_speed.counting(lambda pairs: list(judge.many(pairs)), counts)([PAIR])  # type: ignore[misc,attr-defined]
    orders = [order.tokens for order in verdict.orders]
    assert counts == [sum(each["prompt"] - each["cached"] + each["generated"] for each in orders)] and counts[0] > 0


@pytest.mark.slow
def test_twins_on_a_real_model(reference_q8: Path) -> None:
    runtime = gramlite.RuntimeOptions(device="cpu", threads=1)
    settings = gramlite.Settings(budget=4)
    said: list[dict[str, Any]] = []
    with gramlite.load(reference_q8, settings=settings, runtime=runtime) as judge:
        (ratio,) = gptq_speed.beside_twin(judge, judge, [PAIR, PAIR], said.append)
        assert (
            ratio.turns == 2 and ratio.low > 0 and [row["contender"] for row in said] == ["the folder", "the GGUF file"]
        )
        reader = gptq_speed.through_llama(judge)
        gptq_speed.read_and_write([reader], [judge._encode(PAIR, "ab").tokens[:40]], 3, said.append)
        assert said[-1]["tokens_per_second"]["gramlite"]["write"] > 0
