"""Lets an interrupt reach native code: a signal wakes a thread, which asks the model to stop at once.

Python runs its own signal handlers only between bytecodes, and one forward pass of a large model can take many
seconds. The C-level handler writes to a socket straight away, whatever is running.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in a thread of its own as soon as SIGINT arrives; KeyboardInterrupt is raised as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        while received := receiver.recv(16):
            if signal.SIGINT in received:
                stop()

    watcher = threading.Thread(target=watch, name="gramlite-interrupt", daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        sender.close()
        watcher.join(timeout=1)
        receiver.close()
