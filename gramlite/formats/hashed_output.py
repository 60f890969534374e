"""A file of weights, written from beginning to end and hashed on the way.

Buffers go to the disk past the page cache where the system can (O_DIRECT on Linux): copying gigabytes into it and having
them written back costs the processor more than converting them does. Writing and hashing have a thread each, so that
the caller only fills buffers, of which there are a few.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

BUFFER_BYTES = 4 << 20
BUFFERS = 4
DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux alone has it
BINARY: int = getattr(os, "O_BINARY", 0)  # and this one is Windows'


class HashedOutput:
    """Goes on behind what `path` holds already, which is its header. Use it in a `with`, and `finish` it."""

    def __init__(self, path: Path) -> None:
        header = path.read_bytes()
        self._file = _PlainOrDirect(path)
        self._digest = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("write", "sha256")]
        self._free = deque(mmap.mmap(-1, BUFFER_BYTES) for _ in range(BUFFERS))  # O_DIRECT wants whole pages
        self._busy: deque[tuple[mmap.mmap, list[Future[Any]]]] = deque()
        self._buffer = self._free.popleft()
        self._filled = 0
        self.size = 0
        self.put(header)

    def put(self, data: Any) -> None:
        """Append the bytes of a contiguous buffer; raises OSError as soon as an earlier write has failed."""
        view = memoryview(data)
        self.size += view.nbytes
        left = view.cast("B") if view.nbytes else view
        while left.nbytes:
            part = left[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == BUFFER_BYTES:
                self._send()

    def pad(self, alignment: int) -> None:
        self.put(bytes(-self.size % alignment))

    def finish(self) -> str:
        """Write what is left, wait until all is written, and return the file's sha256."""
        while self._busy:
            self._wait()
        rest = memoryview(self._buffer)[: self._filled]
        self._filled = 0
        self._file.write_end(rest)
        self._digest.update(rest)
        return self._digest.hexdigest()

    def _send(self) -> None:
        view = memoryview(self._buffer)
        work = zip(self._threads, (self._file.write, self._digest.update), strict=True)
        self._busy.append((self._buffer, [thread.submit(does, view) for thread, does in work]))
        if not self._free:
            self._wait()
        self._buffer, self._filled = self._free.popleft(), 0

    def _wait(self) -> None:
        buffer, pending = self._busy.popleft()
        for each in pending:
            each.result()
        self._free.append(buffer)

    def __enter__(self) -> HashedOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        self._file.close()


class _PlainOrDirect:
    """A file that is written past the page cache until the file system says that it can't."""

    def __init__(self, path: Path) -> None:
        self._direct = DIRECT
        try:
            self._descriptor = os.open(path, os.O_WRONLY | BINARY | DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = 0
            self._descriptor = os.open(path, os.O_WRONLY | BINARY)

    def write(self, view: memoryview) -> None:
        """Write whole buffers; what a full disk leaves of one, and what is refused as badly aligned, plainly."""
        while view.nbytes:
            try:
                view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._go_on_plainly()

    def write_end(self, view: memoryview) -> None:
        """Write the file's end, which is no whole block."""
        self._go_on_plainly()
        self.write(view)

    def _go_on_plainly(self) -> None:
        if self._direct:
            import fcntl

            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
            self._direct = 0

    def close(self) -> None:
        os.close(self._descriptor)
