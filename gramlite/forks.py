"""What a process opened, its forked children cannot use: threads and devices stay behind, and locks are held for ever.

A fork copies memory and one thread alone. OpenMP, which llama.cpp and torch compute with, waits in the child for threads
that are not there, and so does onnxruntime when it frees what it made before. So in a child everything that was opened
before is refused before any lock is taken, and none of it is freed, at the child's exit neither.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Any
from weakref import WeakSet

from .errors import GramliteError, ResourceError

logger = logging.getLogger("gramlite")

FORKED = (
    "This judge was loaded before the process was forked, and its threads stayed behind. "
    "Load it again in this process with gramlite.load(...), or start processes with multiprocessing's spawn."
)

_kept: WeakSet[Any] = WeakSet()
_refused: WeakSet[Any] = WeakSet()
_computed = _computed_before = False


class _Behind:
    """What stands in a child where its parent has an open backend: every use is an error, closing changes nothing."""

    def close(self) -> None:
        pass

    def abort(self) -> None:
        raise GramliteError(FORKED)

    def __getattr__(self, name: str) -> Any:
        raise GramliteError(FORKED)


def require_process(process: int) -> None:
    """Raise GramliteError in any process but that one."""
    if os.getpid() != process:
        raise GramliteError(FORKED)


def keep(thing: object, *, refuse: bool = False) -> None:
    """Never free in a forked child what this process opened; with `refuse` it is of no use there, either."""
    (_refused if refuse else _kept).add(thing)


def note_computing() -> None:
    """Native threads were started, whose children may compute with one thread alone."""
    global _computed
    _computed = True


def threads_here(threads: int | None) -> int | None:
    """How many threads a model may be opened with: as asked, but one where the parent's threads stayed behind.

    Raises ResourceError where more are asked for.
    """
    if not _computed_before or threads == 1:
        return threads
    reason = "it was forked from one that had judged already, so that more threads would wait for ever"
    if threads:
        raise ResourceError(
            f"This process cannot compute with {threads} threads: {reason}. "
            "Take one, or start processes with multiprocessing's spawn."
        )
    logger.warning("Judging with one thread in this process: %s. Processes started by spawn take all.", reason)
    return 1


def _leave_behind() -> None:
    global _computed_before
    _computed_before = _computed_before or _computed
    if not _kept and not _refused:
        return
    for thing in [*_kept, *_refused]:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(vars(thing)))
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):  # glibc; once Python is done the child ends before onnxruntime's destructors wait
        library.on_exit(library._exit, None)
    for thing in _refused:
        thing.__class__, thing.__dict__ = _Behind, {}
    _refused.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_behind)
