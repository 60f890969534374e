"""Contenders that take turns, and how their times compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gramlite.judging.pair import Pair


@dataclass
class Contender:
    """Something that judges pairs in both orders, and the seconds a pair that each turn took."""

    name: str
    judge: Callable[[Sequence[Pair]], object]
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """How many times longer `slower` takes than `faster`, turn by turn: median and middle half."""

    slower: str
    faster: str
    median: float
    low: float
    high: float
    turns: int


def take_turns(
    contenders: Sequence[Contender],
    pairs: Sequence[Pair],
    *,
    group: int,
    repetitions: int,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Let the contenders judge each group of pairs in turn, after a warm-up pair that is not counted.

    `tick` is called after each turn, the warm-up's too; `turns_of` says how many there are.
    """
    groups = [pairs[start : start + group] for start in range(0, len(pairs), group)]
    for contender in contenders:
        contender.judge(groups[0][:1])
        tick()
    for repetition in range(repetitions):
        for index, members in enumerate(groups):
            shift = (index + repetition) % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                began = time.perf_counter()
                contender.judge(members)
                contender.seconds.append((time.perf_counter() - began) / len(members))
                tick()


def turns_of(contenders: int, pairs: int, *, group: int, repetitions: int) -> int:
    """How many turns `take_turns` takes."""
    return contenders * (1 + repetitions * -(-pairs // group))


def ratio(slower: Contender, faster: Contender) -> Ratio:
    """The ratio of two contenders' times; both took the same groups of pairs."""
    ratios = sorted(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))
    low, middle, high = middle_half(ratios)
    return Ratio(slower.name, faster.name, middle, low, high, len(ratios))


def middle_half(values: Sequence[float]) -> list[float]:
    """The quartiles of values; a single one is all three of them."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and middle half of times in seconds."""
    low, middle, high = middle_half(seconds)
    return {"median": middle, "low": low, "high": high}
