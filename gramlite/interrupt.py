"""Ctrl-C: one KeyboardInterrupt where it can be raised, native code told to stop, and on the command line an end in time.

Python runs its signal handlers between bytecodes, whatever runs just then. Raised inside a callback of native code an
exception is lost, so that it is held back there. The C-level handler writes to a socket at once, which wakes a thread:
it asks the model to stop, and ends a process that has not come to its end by itself: in a long native call, in a library
that swallows exceptions. That is safe at any moment: rows are on disk, and outputs appear whole or not at all.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import INTERRUPTED

GRACE = 1.2  # seconds from SIGINT until the process is ended by force; a second SIGINT does it at once
temporary_paths: set[Path] = (
    set()
)  # temporary files and folders, which nobody removes once the process is ended by force
SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"  # which a progress bar hides


class _State:
    """What has become of SIGINT in this process, and what is to be done and said."""

    installed = received = reported = False
    raises = True  # whether it is raised in the main thread, which is done once and not while an outcome is reported
    code: int | None = None  # what the process ends with
    stop: Callable[[], None] | None = None
    words: Callable[[], str] | None = None
    arguments: Sequence[str] = ()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a KeyboardInterrupt back until the block, or the function that this decorates, is left."""
    raised = signal.getsignal(signal.SIGINT)
    if not callable(raised) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, raised)
        if held:
            raised(signal.SIGINT, held[0])


def on_interrupt(stop: Callable[[], None]) -> None:
    """Call `stop` in a thread of its own as soon as SIGINT arrives, in place of what was to be called before."""
    _State.stop = stop


def say_on_interrupt(words: Callable[[], str]) -> None:
    """What an interrupt says from here on: what is saved, and what to type to go on."""
    _State.words = words


def begin(arguments: Sequence[str]) -> None:
    """A command line begins, of which nothing is saved yet."""
    _State.arguments, _State.words, _State.reported = arguments, None, False


def resume_hint(*, begun: bool = False) -> str:
    """What to type to go on with a run that keeps its rows; one that was to start anew, and had not, is typed again."""
    arguments = _State.arguments
    if begun or "--force" not in arguments:
        arguments = [*(word for word in arguments if word not in ("--resume", "--force")), "--resume"]
    return f"To go on: {shlex.join(['gramlite', *arguments])}"


def interrupt_types() -> tuple[type[BaseException], ...]:
    """What means an interrupt: KeyboardInterrupt, and once SIGINT came whatever it has led to."""
    import click

    return (BaseException,) if _State.received else (KeyboardInterrupt, click.exceptions.Abort)


def report() -> None:
    """Say once that the command was interrupted, what is saved, and how to go on."""
    from .terminal import note

    if not _State.reported:
        _State.reported = True
        note(_message())


def _message() -> str:
    from .terminal import visible

    return visible(f"Interrupted. {_State.words() if _State.words else ''}".rstrip())


def install() -> None:
    """Handle SIGINT for the rest of the process, unless it is ignored: by nohup, or a shell that starts in the background."""
    if _State.installed or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    _State.installed = True
    signal.signal(signal.SIGINT, _handle)
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_watch, args=(receiver,), name="gramlite-interrupt", daemon=True).start()
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    sys.unraisablehook = _unraisable
    atexit.register(_end_process)


def final_code(code: int) -> int:
    """Raise no more: the outcome is known. Returns the exit code, which SIGINT may still change."""
    _State.raises = False
    _State.code = INTERRUPTED if _State.received else code
    return _State.code


def _handle(number: int, frame: FrameType | None) -> None:
    _State.received = True
    if _State.raises:
        _State.raises = False
        raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    """Stay quiet about a KeyboardInterrupt that was lost in a destructor; `_watch` sees to it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _watch(receiver: socket.socket) -> None:
    while signal.SIGINT not in receiver.recv(16):
        pass
    _State.received = True
    if _State.stop:
        with suppress(Exception):
            _State.stop()
    receiver.settimeout(GRACE)
    with suppress(TimeoutError):
        while signal.SIGINT not in receiver.recv(16):
            pass
    try:
        _report_past_locks()
        _kill_children()
        for path in list(temporary_paths):
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink()
    finally:
        os._exit(INTERRUPTED)


def _report_past_locks() -> None:
    """As `report`, whatever the main thread holds and has left of a progress bar."""
    from .terminal import visible

    if not _State.reported:
        _State.reported = True
        cursor = SHOW_CURSOR if os.isatty(2) else b""
        os.write(2, cursor + visible(_message()).encode("utf-8", "backslashreplace") + b"\n")


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def _end_process() -> None:
    """The process's last act, after all else that is done at exit: Python's own end would leave SIGINT without effect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which lets one that is pending be handled first
    if _State.received:
        _report_past_locks()
    elif _State.code is None:
        return
    with suppress(OSError, ValueError, AttributeError):  # there may be no standard output
        sys.stdout.flush()
    os._exit(INTERRUPTED if _State.received else _State.code or 0)
