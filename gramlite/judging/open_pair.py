"""A pair that is being judged: what was asked for, what has arrived, and whether that is enough."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial

from gramlite.generation.decoder import Answer, Generation
from gramlite.generation.prompt import EncodedPrompt
from gramlite.generation.request import Request

from .conclusion import margin_of
from .confidence import Calibration
from .pair import Order, Pair
from .settings import Settings
from .voting import Rescale, least_votes, settled, wanting


@dataclass(eq=False, kw_only=True)
class OpenPair:
    """A pair that is being judged: its requests, and its generations as they arrive, by order and vote.

    `splits` are the beginnings of each order's prompt that others share, `asked` is how many generations of each order
    were asked for, `waiting` those that the backend has no room for yet, `heard` how many characters of an order's
    thinking were passed on, and the other fields are those of the requests.
    """

    pair: Pair
    settings: Settings
    prompts: Mapping[Order, EncodedPrompt]
    answer: Answer
    flags: tuple[str, ...] = ()
    splits: Mapping[Order, tuple[int, ...]] = field(default_factory=dict)
    adapter: str | None = None
    group: Hashable = field(default_factory=object)
    alone: bool = False
    streams: bool = False
    calibration: Calibration | None = None
    done: dict[tuple[Order, int], Generation] = field(default_factory=dict)
    asked: dict[Order, int] = field(default_factory=dict)
    waiting: deque[Request] = field(default_factory=deque)
    heard: dict[Order, int] = field(default_factory=dict)

    def ask(self, *, ahead: bool = False) -> bool:
        """Put the next vote's request behind those that wait; False where there is none."""
        vote = self.next_vote(ahead=ahead)
        if vote:
            self.waiting.append(self.request(*vote))
        return vote is not None

    def take(self, key: Hashable, generation: Generation) -> None:
        """Take in what one of the requests has come to."""
        assert isinstance(key, tuple)
        self.done[key[1:]] = generation

    def order_of(self, key: Hashable) -> Order:
        assert isinstance(key, tuple)
        order: Order = key[1]
        return order

    def request(self, order: Order, vote: int) -> Request:
        """The request for one generation."""
        return Request(
            key=(id(self), order, vote),
            prompt=(*self.prompts[order].tokens, *self.answer.opening),
            answer=self.answer,
            budget=self.settings.budget,
            temperature=self.settings.sampled_at,
            seed=self._seed(order, vote),
            adapter=self.adapter,
            group=self.group,
            alone=self.alone,
            splits=self.splits.get(order, ()),
            streams=self.streams and vote == 0,
        )

    def _seed(self, order: Order, vote: int) -> int:
        """A seed of its own for every generation, the same whatever is judged beside it."""
        pair = self.pair
        text = json.dumps([self.settings.seed, pair.prompt, pair.response_a, pair.response_b, order, vote])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def idle(self) -> bool:
        return len(self.done) == sum(self.asked.values())

    @property
    def stops_early(self) -> bool:
        """Whether votes that cannot change the verdict are not taken."""
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
        if self.stops_early:
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
        if any(not generation.reads for generation in self.done.values()):
            return True
        if len(self.done) == votes * len(self.prompts):
            return True
        return self.stops_early and settled(self._cast(), votes, self.settings.confidence, self._rescales)

    def _cast(self) -> list[list[float]]:
        """The margins of the votes so far, un-swapped, by order."""
        cast: dict[Order, list[float]] = {order: [] for order in self.settings.presented_orders}
        for (order, _), generation in self.done.items():
            if generation.reads:
                cast[order].append(margin_of(generation, order))
        return list(cast.values())

    @property
    def _rescales(self) -> list[Rescale]:
        orders = self.settings.presented_orders
        if self.calibration is None:
            return [float] * len(orders)
        return [partial(self.calibration.apply, order=order) for order in orders]
