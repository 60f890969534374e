"""A pair that is being judged: what was asked for, what has arrived, and whether that is enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from gramlite.generation.decoder import Generation
from gramlite.generation.prompt import EncodedPrompt
from gramlite.generation.request import Request

from .confidence import Calibration
from .pair import Order, Pair
from .settings import Settings
from .voting import Rescale, least_votes, settled, wanting


@dataclass
class OpenPair:
    """A pair that is being judged: its generations as they arrive, by order and vote, and the requests that make them.

    `asked` is how many generations of each order were asked for.
    """

    pair: Pair
    settings: Settings
    flags: tuple[str, ...]
    prompts: Mapping[Order, EncodedPrompt]
    stems: Mapping[Order, frozenset[int]]
    calibration: Calibration | None = None
    done: dict[tuple[Order, int], Generation] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    asked: dict[Order, int] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return len(self.done) == sum(self.asked.values())

    @property
    def _stops_early(self) -> bool:
        return self.settings.early_stop and self.settings.votes > 1

    @property
    def may_want_more(self) -> bool:
        """Whether votes are left that were not asked for."""
        return sum(self.asked.values()) < self.settings.votes * len(self.prompts)

    def next_vote(self, *, ahead: bool = False) -> tuple[Order, int] | None:
        """The vote to ask for now, as (order, vote): one that it will take for certain or, once those are in, one more.

        With `ahead` that one more is asked for while those are still running.
        """
        votes, confidence = self.settings.votes, self.settings.confidence
        orders = self.settings.presented_orders
        targets = dict.fromkeys(orders, votes)
        if self._stops_early:
            cast, rescales = self._cast(), self._rescales
            targets = {
                order: least_votes(margins, votes, confidence, rescale)
                for order, margins, rescale in zip(orders, cast, rescales, strict=True)
            }
            if (self.idle or ahead) and all(targets[order] <= self.asked.get(order, 0) for order in orders):
                for index in wanting(cast, votes, confidence, rescales):
                    targets[orders[index]] = min(votes, self.asked[orders[index]] + 1)
        for order in orders:
            vote = self.asked.get(order, 0)
            if vote < targets[order]:
                self.asked[order] = vote + 1
                return order, vote
        return None

    def settled(self) -> bool:
        """Whether the pair has all the generations that it needs; one that failed leaves it no verdict."""
        votes = self.settings.votes
        if any(generation.margin is None for generation in self.done.values()):
            return True
        if len(self.done) == votes * len(self.prompts):
            return True
        return self._stops_early and settled(self._cast(), votes, self.settings.confidence, self._rescales)

    def _cast(self) -> list[list[float]]:
        """The margins of the votes so far, un-swapped, by order."""
        cast: dict[Order, list[float]] = {order: [] for order in self.settings.presented_orders}
        for (order, _), generation in self.done.items():
            if generation.margin is not None:
                cast[order].append(generation.margin if order == "ab" else -generation.margin)
        return list(cast.values())

    @property
    def _rescales(self) -> list[Rescale]:
        orders = self.settings.presented_orders
        if self.calibration is None:
            return [float] * len(orders)
        return [partial(self.calibration.apply, order=order) for order in orders]
