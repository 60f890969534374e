"""When enough votes are in: k sampled rationales an order, stopped as soon as the rest cannot change what they say.

Votes are margins, un-swapped, in nats. The exact rule stops a pair once, whatever the votes still to come, the majority
and the mean p_a of every order stay on their side and so does the pair's; a calibrated judge's means are rescaled as its
verdicts are. With a confidence an order is decided earlier: once a sequential test of "both answers are equally likely"
rejects it for the side that the order's mean is on. Orders decided for one side settle the pair; where they are decided
for different ones, the pair hangs on a small difference that nothing was tested of, and the exact rule goes on for it.

The test's statistic, for a votes against b, is the likelihood ratio of a uniform mixture of coins to a fair one,
2^(a+b) a! b! / (a+b+1)!, which under a fair coin exceeds 1/alpha at any time with probability at most alpha (Ville's
inequality; Robbins, 1970). A calibrated judge's votes count by the side that they are on once rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .conclusion import mean_log_odds

EVEN = 1e-5  # nats: a margin so small may be rounded to a tie

Rescale = Callable[[float], float]


def least_votes(order: Sequence[float], votes: int, confidence: float | None, rescale: Rescale = float) -> int:
    """How many votes an order takes at the least, those of `order` among them: if all to come are with its majority."""
    first, second = sorted(count(order), reverse=True)
    ahead, behind = sorted(count([rescale(margin) for margin in order]), reverse=True)
    for spent in range(len(order), votes):
        more = spent - len(order)
        if first + more - second > votes - spent:
            return spent
        if confidence is not None and refutes_even_odds(ahead + more, behind, confidence):
            return spent
    return votes


def wanting(
    orders: Sequence[Sequence[float]], votes: int, confidence: float | None, rescales: Sequence[Rescale] | None = None
) -> list[int]:
    """The orders to ask one more vote each: those that are open themselves, else those that may still turn the pair."""
    rescales = rescales or [float] * len(orders)
    unfinished = [index for index, order in enumerate(orders) if len(order) < votes]
    undecided = [index for index in unfinished if side_of(orders[index], votes, confidence, rescales[index]) is None]
    return undecided or unfinished


def settled(
    orders: Sequence[Sequence[float]], votes: int, confidence: float | None, rescales: Sequence[Rescale] | None = None
) -> bool:
    """Whether the votes in, by order, leave the others nothing to change; `votes` is how many an order has.

    `rescales` are the orders' increasing maps from the margin of the votes to the one that the verdict is read from.
    """
    rescales = rescales or [float] * len(orders)
    sides = {side_of(order, votes, confidence, rescale) for order, rescale in zip(orders, rescales, strict=True)}
    if None in sides:
        return False
    return sides in ({1}, {-1}) or means_are_fixed(orders, votes, rescales)


def side_of(order: Sequence[float], votes: int, confidence: float | None, rescale: Rescale) -> int | None:
    """The side an order is decided for: 1 for A, -1 for B, 0 for a tie, and None while it is open."""
    if not order:
        return None
    mean = rescale(mean_log_odds(list(order)))
    side = 0 if abs(mean) <= EVEN else 1 if mean > 0 else -1
    if is_fixed(order, votes, rescale):
        return side
    first, second = count([rescale(margin) for margin in order])
    tested = confidence is not None and refutes_even_odds(first, second, confidence)
    return side if tested and side * (first - second) > 0 else None  # the test is of the majority, the verdict the mean


def count(order: Sequence[float]) -> tuple[int, int]:
    """Votes for A and for B; even odds are a vote for neither."""
    return sum(margin > 0 for margin in order), sum(margin < 0 for margin in order)


def is_fixed(order: Sequence[float], votes: int, rescale: Rescale) -> bool:
    """Whether the votes to come leave an order's majority and its mean on their sides; none are to come once all are in."""
    if len(order) == votes:
        return True
    return majority_is_fixed(order, votes) and means_are_fixed([order], votes, [rescale])


def majority_is_fixed(order: Sequence[float], votes: int) -> bool:
    first, second = count(order)
    return abs(first - second) > votes - len(order)


def means_are_fixed(orders: Sequence[Sequence[float]], votes: int, rescales: Sequence[Rescale]) -> bool:
    """Whether the orders' mean stays on its side even if every vote to come were certain of the other.

    A mean within the rounding of even odds is on neither side: as many sure votes for A as for B are a tie.
    """
    if all(len(order) == votes for order in orders):
        return True
    low, high = (
        mean_log_odds(
            [
                rescale(mean_log_odds([*order, *[certain] * (votes - len(order))]))
                for order, rescale in zip(orders, rescales, strict=True)
            ]
        )
        for certain in (-math.inf, math.inf)
    )
    return low > EVEN or high < -EVEN


def refutes_even_odds(first: int, second: int, confidence: float) -> bool:
    """Whether `first` votes against `second` refute even odds at this confidence, however often one has looked."""
    spent = first + second
    evidence = spent * math.log(2) + math.lgamma(first + 1) + math.lgamma(second + 1) - math.lgamma(spent + 2)
    return evidence > -math.log(1 - confidence)
