"""Whose turn it is with an open model, and its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from gramlite.errors import GramliteError
from gramlite.forks import keep, require_process

Item = TypeVar("Item")

WAIT = 0.05  # seconds; a run that is only about to begin takes an earlier stop back, so that it is asked again


class Turn:
    """One caller at a time; a caller that already has its turn is told so instead of waiting for itself.

    All judges on one open model share it. A turn lasts as long as an iterator that is not used up; the model is in use
    only while that iterator is asked for more, and may be closed in between.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._in_use = threading.RLock()  # the garbage collector may end an iterator in the thread that closes
        self._user: int | None = None
        self._running: Generator[object, None, None] | None = None
        self._closed = False
        self._stopped = False
        self._process = os.getpid()
        keep(self)

    def __enter__(self) -> None:
        self.require_open()
        if self._owner == threading.get_ident():
            raise GramliteError(
                "This judge is in the middle of .many() in this thread. Finish or close that iterator first."
            )
        while not self._lock.acquire(timeout=10 * WAIT):
            self.require_open()  # who has the turn on a closed model may never come back
        self._owner = threading.get_ident()

    def __exit__(self, *exception: object) -> None:
        self._owner = None
        self._lock.release()

    def run(self, items: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Give out what comes from the model, in a turn."""
        with self:
            self._running, self._stopped = items, False
            try:
                while True:
                    with self.using():
                        try:
                            item = next(items)
                        except StopIteration:
                            return
                    yield item
            finally:
                if os.getpid() == self._process:  # what runs in the parent is not the child's to end
                    with self._in_use:
                        items.close()
                    self._running = None

    @contextmanager
    def using(self) -> Generator[None, None, None]:
        """Keep the model from being closed meanwhile; raises GramliteError where it is."""
        require_process(self._process)
        with self._in_use:
            self.require_open()
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = None

    def require_open(self) -> None:
        """Raise GramliteError where the model is closed, or was opened before this process was forked."""
        require_process(self._process)
        if self._closed:
            raise GramliteError("This judge is closed. Load it again with gramlite.load(...).")

    def require_going(self) -> None:
        """Raise GramliteError where the run was asked to stop, or the model to close."""
        if self._stopped or self._closed:
            raise GramliteError("The judging was stopped.")

    def stop(self) -> None:
        """Have the next `require_going` of what runs raise; safe to call from a signal's thread."""
        require_process(self._process)
        self._stopped = True

    def close(self, *, stop: Callable[[], None], free: Callable[[], None]) -> None:
        """Let nobody use the model any more, stop who does, and free it; a forked child leaves it to its parent."""
        if os.getpid() != self._process:
            return
        if self._user == threading.get_ident():
            raise GramliteError("This judge is in the middle of a verdict in this thread. Close it after that.")
        self._closed = True
        while not self._in_use.acquire(timeout=WAIT):
            stop()
        try:
            if self._running:
                self._running.close()  # while what it gives back is still there
            free()
        finally:
            self._in_use.release()
