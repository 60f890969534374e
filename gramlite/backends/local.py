"""What backends that compute in this process share: being woken and stopped, and what memory that ran out leads to."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

from gramlite.errors import GramliteError, InputError, OutOfMemory
from gramlite.forks import note_computing
from gramlite.generation.decoder import Decoder
from gramlite.generation.request import Ended, Event, Request, Written

from .fallback import Fallback

MOST_PASSED = 8  # times that others may start before a request that waits for room


class LocalBackend:
    """The half of the Backend protocol that does not depend on what computes.

    A backend adds `vocabulary`, `metadata`, `device`, `capabilities`, `start`, `cancel`, and here `_advance` (one
    micro-batch, whose events are appended to `_events`), `_forget` (drop all that was started) and `_running`, `close`,
    and the `_fallback` that loads it; one that is placed nowhere has `context` and `step_down` of its own.
    """

    vocabulary: Any
    _fallback: Fallback[Any]

    def __init__(self) -> None:
        self._woken = threading.Event()
        self._aborted = threading.Event()
        self._events: list[Event] = []
        self._failure = OutOfMemory("memory ran out"), 0

    @property
    def context(self) -> int:
        """The most tokens one sequence may hold."""
        context: int = self._fallback.place.context
        return context

    @property
    def _running(self) -> int:
        """How many requests were started and have not ended."""
        raise NotImplementedError

    def _advance(self) -> None:
        raise NotImplementedError

    def _forget(self) -> None:
        raise NotImplementedError

    def step(self, wait: float) -> list[Event]:
        """See Backend.step."""
        if not self._running:
            self._woken.wait(0 if self._aborted.is_set() else wait)
            self._woken.clear()
            if not self._aborted.is_set():
                return []
        note_computing()
        running = self._running
        try:
            self._require_going()
            self._advance()
        except BaseException as error:
            if self._aborted.is_set():
                self._resume()
            if isinstance(error, OutOfMemory):
                self._failure = error, running
            self._events.clear()
            self._forget()
            raise
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """See Backend.wake."""
        self._woken.set()

    def abort(self) -> None:
        """See Backend.abort."""
        self._aborted.set()
        self._woken.set()

    def step_down(self) -> bool:
        """See Backend.step_down."""
        self._fallback.step_down(*self._failure)
        return True

    def release(self, group: object) -> None:
        """See Backend.release."""

    def open_adapter(self, path: str | None) -> None:
        """See Backend.open_adapter."""
        if path:
            raise InputError("it takes no adapter while it is open; GGUF models do.")

    def _require_going(self) -> None:
        if self._aborted.is_set():
            raise GramliteError("The judging was stopped.")

    def _resume(self) -> None:
        """Take an `abort` back, once it was heard."""
        self._aborted.clear()

    def _require_fit(self, request: Request) -> None:
        """Raise InputError for a request that no sequence holds."""
        if (tokens := len(request.prompt) + request.most_tokens) > self.context:
            raise InputError(f"{tokens:,} tokens exceed the context of {self.context:,}. Raise --context.")

    def _decoder(self, request: Request) -> Decoder:
        """A request's decoder, whose text becomes events."""
        return request.decoder(self.vocabulary, lambda at, text: self._events.append(Written(request.key, at, text)))

    def _end(self, request: Request, decoder: Decoder, cached: int) -> None:
        self._events.append(Ended(request.key, decoder.result(cached=cached)))


class Door:
    """Who may start where something waits for room: what others went past too often holds the door, the first of them."""

    def __init__(self) -> None:
        self._passed: dict[Hashable, int] = {}

    def is_held_against(self, key: Hashable) -> bool:
        holder = next((waiting for waiting, passed in self._passed.items() if passed >= MOST_PASSED), key)
        return holder != key

    def refuse(self, key: Hashable) -> bool:
        """Take note of a request that has to wait; always False."""
        self._passed.setdefault(key, 0)
        return False

    def enter(self, key: Hashable) -> bool:
        """Take note of a request that starts; always True."""
        self._passed.pop(key, None)
        for waiting in self._passed:
            self._passed[waiting] += 1
        return True

    def forget(self, key: Hashable) -> None:
        self._passed.pop(key, None)
