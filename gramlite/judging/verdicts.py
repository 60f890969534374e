"""The verdicts on a stream of pairs, in input order, for a thread that waits or a coroutine that awaits.

Pairs are read, checked and encoded where the verdicts are asked for, a few ahead of those that the engine is deciding.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from gramlite.errors import GramliteError

from .engine import Caller, Engine, TextPiece
from .open_pair import OpenPair
from .pair import Order, Pair, Verdict

Listener = Callable[[Order, str], None]
MOST_READY = 256  # verdicts that wait for an earlier pair's; beyond them no more pairs are read


class Verdicts(Iterator[Verdict], AsyncIterator[Verdict]):
    """One verdict for each pair, in input order; use it with `for` or with `async for`. Make one with `Judge.many`.

    `open` checks and encodes a pair, or settles it without the model; `conclude` makes the verdict of one that is done.
    So many pairs as `ahead` says are in the engine at a time; None reads a pair only once all before it were yielded.
    """

    def __init__(
        self,
        engine: Engine,
        pairs: Iterable[Pair],
        *,
        open: Callable[[Pair], OpenPair | Verdict],
        conclude: Callable[[OpenPair], Verdict],
        limit: int,
        ahead: int | None,
        on_text: Listener | None,
    ) -> None:
        self._engine = engine
        self._open, self._conclude = open, conclude
        self._ahead, self._on_text = ahead, on_text
        self._caller = Caller(limit, engine.aborts)
        self._begun = False
        self._places: dict[OpenPair, int] = {}  # of the pairs that the engine is deciding
        self._ready: dict[int, Verdict] = {}
        self._read = self._emitted = 0
        self._pairs: Iterator[Pair] | None = iter(pairs)

    def __iter__(self) -> Verdicts:
        return self

    def __next__(self) -> Verdict:
        try:
            while (verdict := self._next()) is None:
                self._take(self._caller.inbox.get())
        except BaseException:
            self.close()
            raise
        return verdict

    def __aiter__(self) -> Verdicts:
        return self

    async def __anext__(self) -> Verdict:
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        self._caller.notify = lambda: loop.call_soon_threadsafe(heard.set)
        try:
            while (verdict := self._next()) is None:
                await heard.wait()
                heard.clear()
        except StopIteration:
            raise StopAsyncIteration from None
        except BaseException:
            self.close()
            raise
        finally:
            self._caller.notify = None
        return verdict

    def close(self) -> None:
        """Read no more, and take what was read off the engine's queue."""
        self._pairs = None
        self._ready.clear()
        if self._places:
            self._places.clear()
            self._engine.withdraw(self._caller)

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _next(self) -> Verdict | None:
        """The next verdict, None while the engine is deciding it; raises StopIteration at the end."""
        with self._engine.inside():
            if not self._begun:
                self._begun, self._caller.aborts = True, self._engine.aborts
            while True:
                while not self._caller.inbox.empty():
                    self._take(self._caller.inbox.get())
                if self._caller.aborts != self._engine.aborts:
                    raise GramliteError("The judging was stopped.")
                if self._emitted in self._ready:
                    self._emitted += 1
                    return self._ready.pop(self._emitted - 1)
                if not self._may_read:
                    break
                self._read_one()
        if self._places:
            return None
        raise StopIteration

    @property
    def _may_read(self) -> bool:
        if self._pairs is None:
            return False
        return len(self._places) < (self._ahead or 1) and len(self._ready) < MOST_READY

    def _read_one(self) -> None:
        assert self._pairs is not None
        pair = next(self._pairs, None)
        if pair is None:
            self._pairs = None
            return
        opened = self._open(pair)
        if isinstance(opened, Verdict):
            self._ready[self._read] = opened
        else:
            self._places[opened] = self._read
            self._engine.submit(opened, self._caller)
        self._read += 1

    def _take(self, message: OpenPair | TextPiece | Exception) -> None:
        if isinstance(message, Exception):
            raise message
        if isinstance(message, OpenPair):
            if (place := self._places.pop(message, None)) is not None:
                self._ready[place] = self._conclude(message)
        elif self._on_text:
            with self._engine.inside():
                self._on_text(message.order, message.text)
