"""What a backend is asked for and what it answers, as data: requests, and the events that come of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from .decoder import Answer, Decoder, Generation
from .vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation to make: `prompt` (token ids, the answer's opening included) and how it is decoded.

    `budget` is the most tokens that may be thought, `temperature` 0 is greedy, `adapter` a LoRA file or None. `splits`
    are lengths of the prompt's beginning, ascending, that other requests are likely to share: the first one all, the
    others those of the same `group`. One that is `alone` is computed by itself, always in the same pieces, so that
    its bits depend on nothing else. `streams` asks for the text as it is written. `key` comes back with each event.
    """

    key: Hashable
    prompt: tuple[int, ...]
    answer: Answer
    budget: int = 1024
    temperature: float = 0.0
    seed: int = 0
    adapter: str | None = None
    group: Hashable = None
    alone: bool = False
    splits: tuple[int, ...] = ()
    streams: bool = False

    @property
    def most_tokens(self) -> int:
        """The most tokens that can follow the prompt: the budget and the longest forced scaffold."""
        return self.budget + len(self.answer.closing) + 1 if self.answer.thinks else 0

    def decoder(self, vocabulary: Vocabulary, on_text: Callable[[int, str], None]) -> Decoder:
        """The state machine that decodes this request."""
        return Decoder(
            vocabulary,
            self.answer,
            budget=self.budget,
            temperature=self.temperature,
            seed=self.seed,
            on_text=on_text if self.streams else None,
        )


@dataclass(frozen=True)
class Written:
    """A piece of a generation's thinking, which stands `offset` characters behind its beginning."""

    key: Hashable
    offset: int
    text: str


@dataclass(frozen=True)
class Ended:
    """The end of a request: its generation, or the error that it failed with."""

    key: Hashable
    outcome: Generation | Exception


Event = Written | Ended
