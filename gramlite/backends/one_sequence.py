"""One request after another over a cache that can be cut back: all that a simple backend needs.

A prompt is computed in the stretches between its splits, and only whole stretches are kept for the next prompt, so
that what is computed together, and with it every bit of a result, does not depend on what was judged before. The same
prompt again, as votes ask for it, begins from the logits that it ended with.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from gramlite.generation.decoder import Decoder, Logits
from gramlite.generation.prompt import common_prefix
from gramlite.generation.request import Request
from gramlite.runtime.options import PIECE

from .local import LocalBackend
from .protocol import Capabilities


class OneSequenceBackend(LocalBackend):
    """A backend that runs a request at a time, a piece of the prompt or a token a step.

    One of these adds `_compute(tokens, position)`: it cuts the cache back to `position` tokens, feeds it some more and
    returns the last one's logits, float32 of shape (vocabulary,), valid until the next call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._key: Hashable = None
        self._work: Iterator[None] = iter(())
        self._drop()

    def _compute(self, tokens: Sequence[int], position: int) -> Logits:
        raise NotImplementedError

    def _reserve(self, tokens: int) -> None:
        """See that the cache holds so many tokens."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(sequences=1, cells=self.context, context=self.context)

    @property
    def _running(self) -> int:
        return int(self._key is not None)

    def start(self, request: Request) -> bool:
        """See Backend.start."""
        self._fallback.require_loaded()
        if self._running:
            return False
        self._require_fit(request)
        self._key, self._work = request.key, self._generate(request, self._decoder(request))
        return True

    def cancel(self, key: Hashable) -> None:
        """See Backend.cancel."""
        if key == self._key:
            self._key, self._work = None, iter(())

    def _advance(self) -> None:
        if next(self._work, self) is self:
            self._key = None

    def _forget(self) -> None:
        self._key, self._work = None, iter(())
        self._drop()

    def _drop(self) -> None:
        """Compute everything anew from here on."""
        self._held: tuple[int, ...] = ()
        self._borders: frozenset[int] = frozenset()
        self._ending: Any = None  # the logits behind what is held

    def _generate(self, request: Request, decoder: Decoder) -> Iterator[None]:
        """Compute a request, one call of `_compute` between two yields."""
        prompt = request.prompt
        self._reserve(len(prompt) + request.most_tokens)
        common = common_prefix(self._held, prompt)
        most = common if prompt == self._held else min(common, len(prompt) - 1)
        kept = max((end for end in request.splits if end <= most and end in self._borders), default=0)
        borders = {border for border in self._borders if border <= kept} | set(request.splits)
        ends = {split for split in request.splits if split > kept} | {len(prompt)}
        logits = self._ending
        self._drop()  # until the prompt is there, whatever happens
        for start, end in itertools.pairwise(sorted({kept, *ends})):
            for begin in range(start, end, PIECE):
                if begin > kept:
                    yield
                logits = self._compute(prompt[begin : min(begin + PIECE, end)], begin)
        self._ending = logits.copy() if kept < len(prompt) else logits
        self._held, self._borders = prompt, frozenset(borders)
        position = len(prompt)
        waiting = decoder.advance(logits)
        while not decoder.finished:
            yield
            logits = self._compute(waiting, position)
            position += len(waiting)
            waiting = decoder.advance(logits)
        self._end(request, decoder, kept)
