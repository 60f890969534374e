"""What long measurements show while they work: a bar with an estimate, on a terminal's standard error only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from gramlite.console import Words, progress
from gramlite.judging.pair import Verdict
from gramlite.terminal import note


class SweepProgress:
    """A bar on a terminal's standard error, and a line for each finished step.

    `types` is how many types there are and `pairs` how many pairs each of them judges.
    """

    def __init__(self, *, types: int, pairs: int) -> None:
        self._types, self._pairs = types, pairs
        self._done_types = self._done_pairs = 0
        self._type = self._step = ""
        self._suite_pairs = self._suite_done = 0
        self._began = time.monotonic()
        self._making = [0.0, 0.0]  # seconds spent making, and for how many types
        self._judging = [0.0, 0.0]  # seconds spent judging, and how many pairs
        self._last = 0.0
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> SweepProgress:
        columns = (Words(), BarColumn(bar_width=24), MofNCompleteColumn(), Words("pairs"), TimeElapsedColumn(),
                   Words("{task.fields[left]}"))  # fmt: skip
        self._bar = self._stack.enter_context(progress(*columns))
        self._task = self._bar.add_task("Sweeping", total=self._types * self._pairs, left="")
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def start(self, name: str) -> None:
        """A type begins."""
        self._type, self._began = name, time.monotonic()
        self._update("")

    def make(self, name: str) -> None:
        """A file of the type is being made."""
        note(f"{self._type}: making {name}")
        self._update(f"making {name}")

    def made(self) -> None:
        """The type is there."""
        spent = time.monotonic() - self._began
        if spent > 1:
            self._making = [self._making[0] + spent, self._making[1] + 1]

    def judge(self, suite: str, pairs: int) -> None:
        """A suite of so many pairs begins."""
        self._suite_pairs, self._suite_done, self._last = pairs, 0, time.monotonic()
        self._update(suite)

    def show(self, row: Mapping[str, Any], verdict: Verdict | None) -> None:
        """A row was judged."""
        now = time.monotonic()
        self._judging = [self._judging[0] + now - self._last, self._judging[1] + 1]
        self._last = now
        self._suite_done += 1
        self._update(self._step)

    def advance(self) -> None:
        """A row was there from before; `judged` counts those."""

    def judged(self, seconds_per_pair: float | None) -> None:
        """The suite is done; pairs that were kept from before count as done too."""
        rate = "" if seconds_per_pair is None else f", {seconds_per_pair:.2f} s a pair"
        kept = self._suite_pairs - self._suite_done
        note(f"{self._type}: {self._step}, {self._suite_pairs} pairs ({kept} from before){rate}")
        self._done_pairs += self._suite_pairs
        self._suite_done = 0
        self._update("")

    def finish(self, name: str, failure: str | None) -> None:
        """A type is done, or failed."""
        self._done_types += 1
        self._done_pairs = self._done_types * self._pairs
        if failure:
            note(f"{name} failed: {failure}")
        self._update("")

    def seconds_left(self) -> float | None:
        """An estimate from what was made and judged so far; None until there is something to go by."""
        if not self._judging[1]:
            return None
        pairs = self._types * self._pairs - self._done_pairs - self._suite_done
        making = self._making[0] / self._making[1] if self._making[1] else 0.0
        left = self._types - self._done_types - 1
        return pairs * self._judging[0] / self._judging[1] + max(left, 0) * making

    def _update(self, step: str) -> None:
        self._step = step
        if not self._bar:
            return
        left = self.seconds_left()
        words = "" if left is None else f"about {left / 60:.0f} min left" if left > 90 else "about a minute left"
        about = f"{self._type} ({self._done_types + 1} of {self._types})" + (f", {step}" if step else "")
        self._bar.update(self._task, completed=self._done_pairs + self._suite_done, description=about, left=words)
