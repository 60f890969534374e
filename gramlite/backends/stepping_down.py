"""When a GPU's memory runs out: the model steps down to where it fits, loudly, and what was running starts again.

Every backend goes through here, while it loads and while it judges. A place is where a model runs: a number of layers,
or a whole device. Each step is said once, with its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from gramlite.errors import GramliteError, OutOfMemory, ResourceError
from gramlite.forks import note_computing
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request

logger = logging.getLogger("gramlite")


class Place(Protocol):
    """Where a model runs: `device` in words, `context` the most tokens of a sequence there."""

    @property
    def device(self) -> str: ...

    @property
    def context(self) -> int: ...


AnyPlace = TypeVar("AnyPlace", bound=Place)
Finished = Generator[tuple[int, Generation], None, None]


class Steps(Generic[AnyPlace]):
    """A model and the places where it may run, one below the other.

    `load(place)` loads it, returns the place where that is another, and raises OutOfMemory where the GPU is too small;
    `free()` undoes it. `below(place, context)`
    is the next lower place, None where there is none, as with `cuda` demanded; a `context` that is not None must be kept.
    Making one loads the model; raises ResourceError where it fits nowhere.
    """

    def __init__(
        self,
        place: AnyPlace,
        *,
        load: Callable[[AnyPlace], AnyPlace | None],
        free: Callable[[], None],
        below: Callable[[AnyPlace, int | None], AnyPlace | None],
    ) -> None:
        self.place = place
        self._load = load
        self._free = free
        self._below = below
        self._loaded = False
        self._stopped = False
        self._settle(place, None)

    def generate(
        self, requests: Iterable[Request | None], run: Callable[[Iterator[Request | None]], Finished]
    ) -> Finished:
        """Run requests; each time memory runs out the model steps down and those that are not finished start again."""
        self.require_loaded()
        note_computing()
        self._stopped = False
        source = iter(requests)
        unfinished: dict[int, Request] = {}
        again: list[Request] = []

        def coming() -> Iterator[Request | None]:
            yield from again
            for request in source:
                if request:
                    unfinished[request.key] = request
                yield request

        while True:
            running = run(coming())
            try:
                for key, generation in running:
                    del unfinished[key]
                    yield key, generation
                return
            except OutOfMemory as error:
                again = list(unfinished.values())
                self._move(error, len(again))
            finally:
                running.close()
            for request in again:
                request.decoder.restart()

    def require_loaded(self) -> None:
        """Raise ResourceError where stepping down has left no model."""
        if not self._loaded:
            raise ResourceError(
                "The model is not loaded any more, memory ran out. Open it again with a smaller --context."
            )

    def abort(self) -> None:
        """Do not start anything again; safe to call from another thread."""
        self._stopped = True

    def _move(self, error: OutOfMemory, count: int) -> None:
        if self._stopped:
            raise GramliteError("The judging was stopped.") from error
        context = self.place.context
        what = "1 running request starts" if count == 1 else f"{count} running requests start"
        lower = self._step(self.place, context, error, "while judging", f"; {what} again")
        self._free()
        self._loaded = False
        self._settle(lower, context)

    def _settle(self, place: AnyPlace, context: int | None) -> None:
        while not self._loaded:
            try:
                self.place = self._load(place) or place
                self._loaded = True
            except OutOfMemory as error:
                self._free()
                place = self._step(place, context, error, "while the model was loaded", "")

    def _step(self, place: AnyPlace, context: int | None, error: OutOfMemory, when: str, then: str) -> AnyPlace:
        lower = self._below(place, context)
        reason = str(error).rstrip(".")
        if lower is None:
            raise ResourceError(
                f"Out of memory on {place.device} {when}: {reason}. --device cuda never falls back. "
                "Type --device auto, a smaller --context, or: gramlite doctor"
            ) from error
        told = (place.device, when, reason, lower.device, then)
        logger.warning("Out of memory on %s %s: %s. Stepping down to %s%s.", *told)
        return lower
