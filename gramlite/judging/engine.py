"""The engine: one thread owns an open model, and all that is judged with it comes through one queue.

Callers in any thread put pairs in and get them back with their generations. What a backend has room for runs together,
pairs in the order in which they came; what memory that ran out has dropped starts again, with less beside it. Nothing
that a caller does, reading input or listening, happens in this thread.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TypeVar
from weakref import WeakSet

from gramlite.backends.protocol import Backend
from gramlite.errors import GramliteError, OutOfMemory
from gramlite.forks import keep, require_process
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Event, Request, Written

from .open_pair import OpenPair
from .pair import Order
from .settings import FEW_SEQUENCES, OPEN_PAIRS

WAIT = 1.0  # seconds that a backend may wait for something to do
IDLE = 5.0  # seconds after which a thread without work ends; the next work starts another
AT_EXIT = 2.0  # seconds that all engines have to stop in when the process ends
MOST_UNHEARD = 1000  # pieces of text that wait for a listener, beyond which it is told no more
MOST_BYPASSES = 16  # pairs that may be tried to start when an earlier one has no room

Result = TypeVar("Result")


@dataclass(frozen=True)
class TextPiece:
    """A piece of a rationale, as it was written in one order of a pair."""

    order: Order
    text: str


Message = OpenPair | TextPiece | Exception


@dataclass(eq=False)
class Caller:
    """Who waits for pairs: `inbox` takes the pairs that are done, what is heard meanwhile, and the error that ends it all.

    At most `limit` of its requests run at a time. `notify` is called after each message. `aborts` is how often the
    engine had been aborted when this began.
    """

    limit: int
    aborts: int
    inbox: SimpleQueue[Message] = field(default_factory=SimpleQueue)
    notify: Callable[[], object] | None = None
    running: int = 0

    def put(self, message: Message) -> None:
        self.inbox.put(message)
        if notify := self.notify:
            with suppress(RuntimeError):  # the caller's event loop may be closed
                notify()


class Engine:
    """Runs a backend in a thread of its own, for all judges on it. Use it through a judge."""

    def __init__(self, backend: Backend) -> None:
        self.aborts = 0
        self._backend = backend
        self._process = os.getpid()
        self._closed = self._freed = False
        self._inside: set[int] = set()  # threads that do what belongs to a verdict
        self._posted: SimpleQueue[Callable[[], object]] = SimpleQueue()  # safe in destructors, which withdraw
        self._lock = threading.Lock()  # held to start the thread, and by it to end
        self._thread: threading.Thread | None = None
        self._pairs: dict[OpenPair, Caller] = {}  # in the order in which they came
        self._started: dict[Hashable, tuple[OpenPair, Request]] = {}
        self._most = backend.capabilities.sequences
        self._expired = 0  # the aborts that were heard
        self._stopping = False  # since one was heard, until the backend has heard it too
        self._changed = False  # since it was last looked at what may start
        keep(self)
        _engines.add(self)

    # ------------------------------------------------------------ called from any thread
    def require_open(self) -> None:
        """Raise GramliteError where the model is closed, or was opened before this process was forked."""
        require_process(self._process)
        if self._closed:
            raise GramliteError("This judge is closed. Load it again with gramlite.load(...).")

    def submit(self, pair: OpenPair, caller: Caller) -> None:
        """Put a pair on the queue; it comes back to the caller's inbox."""
        self._post(lambda: self._add(pair, caller))

    def withdraw(self, caller: Caller) -> None:
        """Drop what a caller has on the queue."""
        if os.getpid() == self._process:
            self._posted.put(lambda: self._drop_all(caller))

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function in the engine's thread, between two steps."""
        self.require_open()
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return future.result()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Mark this thread as one that is in the middle of a verdict, and must not close the model."""
        self.require_open()
        thread = threading.get_ident()
        nested = thread in self._inside
        self._inside.add(thread)
        try:
            yield
        finally:
            if not nested:
                self._inside.discard(thread)

    def abort(self) -> None:
        """Let all that is being judged end with an error soon; safe to call from a signal's thread."""
        require_process(self._process)
        self._backend.abort()
        self.aborts += 1
        self._posted.put(lambda: None)

    def close(self) -> None:
        """Let nobody use the model any more, stop who does, and free it; a forked child leaves it to its parent."""
        if os.getpid() != self._process:
            return
        if threading.get_ident() in self._inside:
            raise GramliteError("This judge is in the middle of a verdict in this thread. Close it after that.")
        self.stop()
        if not self._freed:
            self._freed = True
            self._backend.close()

    def stop(self, most: float | None = None) -> None:
        """Refuse every use from here on, and wait for the thread to end, at most so many seconds."""
        self._closed = True
        ends = time.monotonic() + most if most is not None else None
        while (thread := self._thread) and thread.is_alive() and (ends is None or time.monotonic() < ends):
            self.abort()
            thread.join(0.05)

    def _post(self, function: Callable[[], None]) -> None:
        with self._lock:
            self.require_open()
            self._posted.put(function)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gramlite-engine", daemon=True)
                self._thread.start()
        self._backend.wake()

    # ------------------------------------------------------------ the engine's own thread
    def _run(self) -> None:
        while not self._closed:
            try:
                self._take_posted()
                if self._changed:
                    self._changed = False
                    self._start_waiting()
                if self._started or self._stopping:
                    self._step()
                else:
                    self._posted.get(timeout=IDLE)()
            except Empty:
                if self._may_end():
                    return
            except Exception as error:  # a fault of ours: whoever waits hears of it
                self._fail(list(self._pairs), error)
        with self._lock:
            self.aborts += 1
            self._take_posted()

    def _take_posted(self) -> None:
        while not self._posted.empty():
            self._posted.get()()
        self._expire()

    def _may_end(self) -> bool:
        with self._lock:
            if not self._posted.empty() or self._pairs:
                return False
            self._thread = None
            return True

    def _add(self, pair: OpenPair, caller: Caller) -> None:
        self._pairs[pair] = caller
        self._changed = True

    def _drop_all(self, caller: Caller) -> None:
        for pair in [pair for pair, its in self._pairs.items() if its is caller]:
            self._drop(pair)

    def _expire(self) -> None:
        """Fail what had begun before the last abort."""
        if self._expired != self.aborts or self._closed:
            self._expired, self._stopping = self.aborts, True
            begun = [pair for pair, caller in self._pairs.items() if caller.aborts != self.aborts]
            self._fail(begun, GramliteError("The judging was stopped."))

    def _start_waiting(self) -> None:
        """Start what there is room for: pairs in the order in which they came, and a few past those that have no room."""
        voting = sum(pair.stops_early and pair.may_want_more for pair in self._pairs if pair.asked)
        waits = 0
        for pair in list(self._pairs):
            if not pair.asked and pair.stops_early:
                voting += 1
            crowded = not pair.asked and pair.stops_early and voting > OPEN_PAIRS
            waits += crowded or not self._start(pair)
            if waits > MOST_BYPASSES:
                return
        for pair in list(self._pairs):
            if not waits and not pair.alone:
                self._start(pair, ahead=True)

    def _start(self, pair: OpenPair, *, ahead: bool = False) -> bool:
        """Start what a pair wants, `ahead` of knowing whether it will; False where something of it has to wait."""
        caller = self._pairs[pair]
        few = min(FEW_SEQUENCES, self._most)
        while pair.waiting or ((not ahead or len(self._started) < few) and pair.ask(ahead=ahead)):
            if caller.running >= caller.limit or len(self._started) >= self._most:
                return False
            request = pair.waiting[0]
            try:
                if not self._backend.start(request):
                    return False
            except Exception as error:
                self._fail([pair], error)
                return True
            self._started[request.key] = pair, pair.waiting.popleft()
            caller.running += 1
        return True

    def _step(self) -> None:
        try:
            events = self._backend.step(WAIT)
        except Exception as error:
            stopped = self._stopping or self._expired != self.aborts
            self._expire()
            self._stopping = False
            if not stopped and (not isinstance(error, OutOfMemory) or not self._step_down()):
                self._fail_started(error)
            for key in list(self._started)[::-1]:  # before all that waits
                pair, request = self._end(key)
                pair.waiting.appendleft(request)
        else:
            self._stopping = False
            for event in events:
                if event.key in self._started:
                    self._take(event)

    def _step_down(self) -> bool:
        """Go where memory suffices, to start what ran again with less beside it; False where there is no such place."""
        self._most = max(1, len(self._started) // 2)
        try:
            return self._backend.step_down()
        except Exception as refusal:
            self._fail_started(refusal)
            return True

    def _take(self, event: Event) -> None:
        if isinstance(event, Written):
            self._tell(event)
            return
        pair, _ = self._end(event.key)
        if not isinstance(event.outcome, Generation):
            self._fail([pair], event.outcome)
            return
        pair.take(event.key, event.outcome)
        if pair.settled():
            caller = self._pairs[pair]
            self._drop(pair)
            caller.put(pair)

    def _tell(self, event: Written) -> None:
        """Pass on what goes beyond what was heard; a listener that has stopped listening is told no more."""
        pair, _ = self._started[event.key]
        order, caller = pair.order_of(event.key), self._pairs[pair]
        heard = pair.heard.get(order, 0)
        fresh = event.text[max(0, heard - event.offset) :]
        pair.streams = pair.streams and caller.inbox.qsize() <= MOST_UNHEARD
        if fresh and pair.streams:
            pair.heard[order] = heard + len(fresh)
            caller.put(TextPiece(order, fresh))

    def _end(self, key: Hashable) -> tuple[OpenPair, Request]:
        self._changed = True
        pair, request = self._started.pop(key)
        self._pairs[pair].running -= 1
        return pair, request

    def _fail_started(self, error: Exception) -> None:
        self._fail(list(dict.fromkeys(pair for pair, _ in self._started.values())), error)

    def _fail(self, pairs: Sequence[OpenPair], error: Exception) -> None:
        for pair in pairs:
            caller = self._pairs[pair]
            self._drop(pair)
            caller.put(error)

    def _drop(self, pair: OpenPair) -> None:
        """Take a pair off the queue, and what of it runs or waits out of the backend."""
        running = [key for key, (its, _) in self._started.items() if its is pair]
        for key in running:
            self._end(key)
        for key in [*running, *(request.key for request in pair.waiting)]:
            self._backend.cancel(key)
        del self._pairs[pair]
        if not any(other.group == pair.group for other in self._pairs):
            self._backend.release(pair.group)
        self._changed = True


_engines: WeakSet[Engine] = WeakSet()


@atexit.register
def _stop_all() -> None:
    """Let no thread compute while Python ends."""
    ends = time.monotonic() + AT_EXIT
    for engine in list(_engines):
        if engine._process == os.getpid():
            engine.stop(max(0.0, ends - time.monotonic()))
