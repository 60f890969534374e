"""Whose turn it is with an open model."""

from __future__ import annotations

import threading

from .errors import GramliteError


class Turn:
    """One caller at a time; a caller that already has its turn is told so instead of waiting for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise GramliteError(
                "This judge is in the middle of .many() in this thread. Finish or close that iterator first."
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *exception: object) -> None:
        self._owner = None
        self._lock.release()
