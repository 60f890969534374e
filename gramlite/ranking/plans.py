"""Which completions to compare next: a plan yields batches of index pairs, is sent their margins, and ends in an order.

A margin is the log-odds in nats that the first of the two is better; 0, even odds, keeps the earlier one ahead. A plan
returns indices from best to worst, or None where only scores over all its comparisons can say. Pairs of one batch do
not depend on each other, so they are judged together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from typing import Literal

Batch = list[tuple[int, int]]
Plan = Generator[Batch, Sequence[float], list[int] | None]
Method = Literal["best", "tournament", "full"]
SWISS_FROM = 33  # completions; fewer are sorted
EXTRA_ROUNDS = 1  # of a swiss tournament, beyond the log2 that a knockout has


def plan_for(method: Method, count: int) -> Plan:
    """The plan of a method for `count` completions."""
    if method == "best":
        return knockout(count)
    if method == "full":
        return round_robin(count)
    return merge_sort(count) if count < SWISS_FROM else swiss(count)


def knockout(count: int) -> Plan:
    """Losers leave: count - 1 comparisons find the best. The others follow by the round and the margin of their loss."""
    standing = list(range(count))
    left: list[list[int]] = []
    while len(standing) > 1:
        odd = standing[-1:] if len(standing) % 2 else []
        matches = list(zip(standing[::2], standing[1::2], strict=False))
        margins = yield matches
        lost = [(abs(m), second if m >= 0 else first) for (first, second), m in zip(matches, margins, strict=True)]
        left.append([loser for _, loser in sorted(lost)])
        standing = odd + [
            first if margin >= 0 else second for (first, second), margin in zip(matches, margins, strict=True)
        ]
    return standing + [loser for losers in reversed(left) for loser in losers]


def merge_sort(count: int) -> Plan:
    """A whole order in at most count·log2(count) comparisons; merges of one level advance together."""
    runs = [[index] for index in range(count)]
    while len(runs) > 1:
        merged: list[list[int]] = [[] for _ in range(math.ceil(len(runs) / 2))]
        while unfinished := [n for n in range(len(runs) // 2) if runs[2 * n] and runs[2 * n + 1]]:
            margins = yield [(runs[2 * n][0], runs[2 * n + 1][0]) for n in unfinished]
            for n, margin in zip(unfinished, margins, strict=True):
                merged[n].append(runs[2 * n if margin >= 0 else 2 * n + 1].pop(0))
        for number, run in enumerate(runs):
            merged[number // 2] += run
        runs = merged
    return runs[0] if runs else []


def swiss(count: int) -> Plan:
    """Rounds in which those with like records meet, nobody twice: about count/2·log2(count) comparisons."""
    points = [0.0] * count
    met: set[tuple[int, int]] = set()
    rested: set[int] = set()
    for _ in range(math.ceil(math.log2(count)) + EXTRA_ROUNDS):
        table = sorted(range(count), key=lambda index: (-points[index], index))
        if count % 2:
            rests = next((index for index in reversed(table) if index not in rested), table[-1])
            rested.add(rests)
            table.remove(rests)
            points[rests] += 1
        matches: Batch = []
        while table:
            first = table.pop(0)
            second = next((other for other in table if _pair(first, other) not in met), None)
            if second is not None:
                table.remove(second)
                matches.append(_pair(first, second))
        met.update(matches)
        margins = yield matches
        for (first, second), margin in zip(matches, margins, strict=True):
            won = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
            points[first] += won
            points[second] += 1 - won
    return None


def round_robin(count: int) -> Plan:
    """Every pair once."""
    yield list(itertools.combinations(range(count), 2))
    return None


def _pair(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)
