"""Generation of one request after another over a cache that can be cut back: all that a simple backend needs.

A prompt is computed in the stretches between its splits, and only whole stretches are kept for the next prompt, so
that what is computed together, and with it every bit of a result, does not depend on what was judged before. The same
prompt again, as votes ask for it, begins from the logits that it ended with.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from gramlite.errors import GramliteError
from gramlite.generation.decoder import Generation, Logits
from gramlite.generation.prompt import common_prefix
from gramlite.generation.request import Request
from gramlite.runtime.options import PIECE

Compute = Callable[[Sequence[int], int], Logits]


class OneSequence:
    """Runs requests through `compute(tokens, position)`.

    It cuts the cache back to `position` tokens, feeds it some more and returns the last one's logits, float32 of shape
    (vocabulary,), valid until the next call.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._held: tuple[int, ...] = ()
        self._borders: frozenset[int] = frozenset()
        self._ending: Any = None  # the logits behind what is held
        self._stop = threading.Event()

    def generate(self, requests: Iterable[Request | None]) -> Generator[tuple[int, Generation], None, None]:
        """See Backend.generate."""
        self._stop.clear()
        for request in requests:
            if request:
                yield request.key, request.decoder.result() if request.decoder.finished else self._run(request)

    def abort(self) -> None:
        """Make a running `generate` stop soon; safe to call from another thread."""
        self._stop.set()

    def forget(self) -> None:
        """Compute everything anew from here on."""
        self._held, self._borders = (), frozenset()

    def _run(self, request: Request) -> Generation:
        prompt, decoder = request.prompt, request.decoder
        common = common_prefix(self._held, prompt)
        most = common if prompt == self._held else min(common, len(prompt) - 1)
        kept = max((end for end in request.splits if end <= most and end in self._borders), default=0)
        borders = {border for border in self._borders if border <= kept} | set(request.splits)
        self.forget()  # until the prompt is there, whatever happens
        ends = {split for split in request.splits if split > kept} | {len(prompt)}
        logits = self._ending
        for start, end in itertools.pairwise(sorted({kept, *ends})):
            for begin in range(start, end, PIECE):
                logits = self._feed(prompt[begin : min(begin + PIECE, end)], begin)
        self._ending = logits.copy() if kept < len(prompt) else logits
        self._held, self._borders = prompt, frozenset(borders)
        position = len(prompt)
        waiting = decoder.advance(logits)
        while not decoder.finished:
            logits = self._feed(waiting, position)
            position += len(waiting)
            waiting = decoder.advance(logits)
        return decoder.result(cached=kept)

    def _feed(self, tokens: Sequence[int], position: int) -> Logits:
        if self._stop.is_set():
            raise GramliteError("The judging was stopped.")
        try:
            return self._compute(tokens, position)
        except BaseException:
            self.forget()  # what the cache holds now is not known
            raise
