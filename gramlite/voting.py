"""When enough votes are in: k sampled rationales an order, stopped as soon as the rest cannot change what they say.

The exact rule stops a pair once, whatever the votes still to come, the majority and the mean p_a of every order stay
on their side and so does the pair's. With a confidence it stops earlier: once a sequential test of "both answers are
equally likely" rejects it for every order. The test's statistic, for a votes against b, is the likelihood ratio of a
uniform mixture of coins to a fair one, 2^(a+b) a! b! / (a+b+1)!, which under a fair coin exceeds 1/alpha at any time
with probability at most alpha (Ville's inequality; Robbins, 1970).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EVEN = 1e-5  # a mean p_a so near to 0.5 may be rounded to it


def least_votes(order: Sequence[float], votes: int, confidence: float | None) -> int:
    """How many votes an order takes at the least, those of `order` among them: if all to come are with its majority."""
    first, second = sorted(count(order), reverse=True)
    for spent in range(len(order), votes):
        ahead = first + spent - len(order)
        if ahead - second > votes - spent or (confidence is not None and refutes_even_odds(ahead, second, confidence)):
            return spent
    return votes


def wanting(orders: Sequence[Sequence[float]], votes: int, confidence: float | None) -> list[int]:
    """The orders to ask one more vote each: those that are open themselves, else those that may still turn the pair."""
    unfinished = [index for index, order in enumerate(orders) if len(order) < votes]
    undecided = [
        index
        for index in unfinished
        if not is_fixed(orders[index], votes)
        and not (confidence is not None and refutes_even_odds(*count(orders[index]), confidence))
    ]
    return undecided or unfinished


def settled(orders: Sequence[Sequence[float]], votes: int, confidence: float | None) -> bool:
    """Whether the votes in, as p_a by order, leave the others nothing to change; `votes` is how many an order has."""
    if confidence is not None and all(refutes_even_odds(*count(order), confidence) for order in orders):
        return True
    return all(is_fixed(order, votes) for order in orders) and mean_is_fixed([p for order in orders for p in order], votes * len(orders))


def count(order: Sequence[float]) -> tuple[int, int]:
    """Votes for A and for B; even odds are a vote for neither."""
    return sum(p > 0.5 for p in order), sum(p < 0.5 for p in order)


def is_fixed(order: Sequence[float], votes: int) -> bool:
    """Whether the votes to come leave an order's majority and its mean on their sides."""
    return majority_is_fixed(order, votes) and mean_is_fixed(order, votes)


def majority_is_fixed(order: Sequence[float], votes: int) -> bool:
    first, second = count(order)
    return abs(first - second) > votes - len(order)


def mean_is_fixed(order: Sequence[float], votes: int) -> bool:
    """Whether the mean p_a stays on its side of 0.5 even if every vote to come were certain of the other.

    A mean within the rounding of even odds is on neither side: as many sure votes for A as for B are a tie.
    """
    total = math.fsum(order)
    even = votes * EVEN
    return len(order) == votes or total - votes / 2 > even or votes / 2 - total - (votes - len(order)) > even


def refutes_even_odds(first: int, second: int, confidence: float) -> bool:
    """Whether `first` votes against `second` refute even odds at this confidence, however often one has looked."""
    spent = first + second
    evidence = spent * math.log(2) + math.lgamma(first + 1) + math.lgamma(second + 1) - math.lgamma(spent + 2)
    return evidence > -math.log(1 - confidence)
