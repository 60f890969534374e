"""Bradley-Terry scores of things that were compared in pairs, and the cycles that no score can explain."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from gramlite.judging.logistic import Floats, fit_logistic

PRIOR_SPREAD = 2.0  # nats
MOST_CYCLES = 100


def bradley_terry(
    count: int, comparisons: Iterable[tuple[int, int, float]], *, spread: float = PRIOR_SPREAD
) -> tuple[Floats, Floats]:
    """Scores in nats, with mean zero, and their standard errors, of `count` things.

    Each comparison is (first, second, outcome): a game that `first` won with 1, lost with 0, or won in part, as a
    judge's probability says. Under a score difference of d, first wins with probability 1 / (1 + exp(-d)) (Bradley &
    Terry 1952). Scores are regularised as draws from a normal distribution of standard deviation `spread`, so they
    stay finite after a perfect record or without a game; `spread=math.inf` is plain maximum likelihood, which has an
    answer only where everything has won and lost against the rest. Standard errors come from the curvature of the
    regularised likelihood and count a comparison as one game.
    """
    games = list(comparisons)
    design = np.zeros((len(games), count))
    rows = np.arange(len(games))
    design[rows, [first for first, _, _ in games]] = 1
    design[rows, [second for _, second, _ in games]] = -1
    outcomes = np.array([outcome for _, _, outcome in games], dtype=np.float64)
    # without a spread only differences count: pin the mean, which changes none of them
    penalty = np.eye(count) / spread**2 if math.isfinite(spread) else np.full((count, count), 1 / count)
    scores, covariance = fit_logistic(design, outcomes, penalty)
    centred = np.eye(count) - 1 / count
    variances = np.diag(centred @ covariance @ centred)
    return scores - scores.mean(), np.sqrt(np.maximum(variances, 0))


def cycles(beats: Mapping[int, set[int]], *, limit: int = MOST_CYCLES) -> list[tuple[int, ...]]:
    """Circles of preference, each from its smallest member on: (0, 2, 5) says that 0 beats 2, 2 beats 5, 5 beats 0.

    Every circle of three is found, in order, up to `limit`; where everything was compared, any longer circle contains
    one. A tangle without a circle of three, which missing comparisons can leave, gives one of its shortest.
    """
    found = []
    for triad in _triads(beats):
        found.append(triad)
        if len(found) >= limit:
            return found
    covered = {member for triad in found for member in triad}
    for tangle in _tangles(beats):
        if covered.isdisjoint(tangle):
            found.append(_shortest(beats, tangle))
    return sorted(found)[:limit]


def _triads(beats: Mapping[int, set[int]]) -> Iterator[tuple[int, ...]]:
    for first in sorted(beats):
        for second in sorted(loser for loser in beats[first] if loser > first):
            for third in sorted(loser for loser in beats.get(second, ()) if loser > first):
                if first in beats.get(third, ()):
                    yield first, second, third


def _tangles(beats: Mapping[int, set[int]]) -> list[set[int]]:
    """The sets of more than one thing that can all reach each other: strongly connected components (Kosaraju)."""
    loses_to: dict[int, set[int]] = {}
    for winner, losers in beats.items():
        for loser in losers:
            loses_to.setdefault(loser, set()).add(winner)
    order: list[int] = []
    _visit(sorted(beats), beats, set(), order)
    seen: set[int] = set()
    components = []
    for start in reversed(order):
        component: list[int] = []
        _visit([start], loses_to, seen, component)
        if len(component) > 1:
            components.append(set(component))
    return components


def _visit(starts: Sequence[int], edges: Mapping[int, set[int]], seen: set[int], finished: list[int]) -> None:
    """Depth first from `starts`; appends what it reaches for the first time, in the order of leaving it."""
    for start in starts:
        if start in seen:
            continue
        seen.add(start)
        stack = [(start, iter(sorted(edges.get(start, ()))))]
        while stack:
            node, ahead = stack[-1]
            step = next((other for other in ahead if other not in seen), None)
            if step is None:
                finished.append(stack.pop()[0])
            else:
                seen.add(step)
                stack.append((step, iter(sorted(edges.get(step, ())))))


def _shortest(beats: Mapping[int, set[int]], tangle: set[int]) -> tuple[int, ...]:
    """A shortest circle within a tangle, from its smallest member on."""
    best = min((_circle_through(beats, tangle, start) for start in sorted(tangle)), key=len)
    turn = best.index(min(best))
    return best[turn:] + best[:turn]


def _circle_through(beats: Mapping[int, set[int]], tangle: set[int], start: int) -> tuple[int, ...]:
    paths: deque[tuple[int, ...]] = deque([(start,)])
    seen = set()
    while True:  # everything in a tangle can reach `start`
        path = paths.popleft()
        for other in sorted(beats.get(path[-1], set()) & tangle):
            if other == start:
                return path
            if other not in seen:
                seen.add(other)
                paths.append((*path, other))
