"""Where a model runs, and where it goes when a GPU's memory runs out: to the next lower place, loudly.

Every backend that loads a model goes through here, while it loads and while it judges. A place is where a model runs: a
number of layers, or a whole device. Each step down is said once, with its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from gramlite.errors import OutOfMemory, ResourceError

logger = logging.getLogger("gramlite")


class Placed(Protocol):
    """Where a model runs: `device` in words, `context` the most tokens of a sequence there."""

    @property
    def device(self) -> str: ...

    @property
    def context(self) -> int: ...


AnyPlace = TypeVar("AnyPlace", bound=Placed)


class Fallback(Generic[AnyPlace]):
    """A model and the places where it may run, one below the other.

    `load(place)` loads it, returns the place where that is another, and raises OutOfMemory where the GPU is too small;
    `free()` undoes it. `below(place, context)` is the next lower place, None where there is none, as with `cuda`
    demanded; a `context` that is not None must be kept.
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
        self._settle(place, None)

    def require_loaded(self) -> None:
        """Raise ResourceError where stepping down has left no model."""
        if not self._loaded:
            raise ResourceError(
                "The model is not loaded any more, memory ran out. Open it again with a smaller --context."
            )

    def step_down(self, error: OutOfMemory, running: int) -> None:
        """Load the model in the next lower place; `running` is how many requests the memory ran out on.

        Raises ResourceError where there is none; then the model stays where it is.
        """
        context = self.place.context
        what = "1 running request starts" if running == 1 else f"{running} running requests start"
        lower = self._lower(self.place, context, error, "while judging", f"; {what} again")
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
                place = self._lower(place, context, error, "while the model was loaded", "")

    def _lower(self, place: AnyPlace, context: int | None, error: OutOfMemory, when: str, then: str) -> AnyPlace:
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
