"""A pair that is being judged: what was asked for, what has arrived, and whether that is enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .decoding import Decoder, Generation, softmax_first
from .pair import Order, Pair
from .prompt import EncodedPrompt
from .settings import Settings
from .voting import settled


@dataclass
class OpenPair:
    """A pair that is being judged: its generations as they arrive, by order and vote, and the decoders that make them.

    `stages` are the portions of votes still to be asked for, `asked` is how many generations were.
    """

    pair: Pair
    settings: Settings
    flags: tuple[str, ...]
    prompts: Mapping[Order, EncodedPrompt]
    stems: Mapping[Order, frozenset[int]]
    stages: list[range] = field(default_factory=list)
    done: dict[tuple[Order, int], Generation] = field(default_factory=dict)
    decoders: list[Decoder] = field(default_factory=list)
    asked: int = 0

    @property
    def idle(self) -> bool:
        return len(self.done) == self.asked

    def next_stage(self) -> Iterator[tuple[Order, int]]:
        """The next portion of votes to ask for, as (order, vote)."""
        stage = self.stages.pop(0)
        self.asked += len(stage) * len(self.prompts)
        for order in self.settings.presented_orders:
            for vote in stage:
                yield order, vote

    def settled(self) -> bool:
        """Whether the pair has all the generations that it needs."""
        if self.idle and not self.stages:
            return True
        if not self.settings.early_stop or self.settings.votes == 1:
            return False
        shares: dict[Order, list[float]] = {order: [] for order in self.settings.presented_orders}
        for (order, _), generation in self.done.items():
            if generation.margin is None:
                return False
            shares[order].append(softmax_first(generation.margin if order == "ab" else -generation.margin))
        return settled(list(shares.values()), self.settings.votes, self.settings.confidence)
