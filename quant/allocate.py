"""Which type each matrix takes: the bytes go where they make the verdicts' margins change least.

Changes of different matrices may add up (rounding can undo a fine-tuning everywhere at once) or not, so what is made
small is the mean square of their sum plus twice the sum of their mean squares; and a little of the layers' own output errors,
because rationales hang on more than the verdict's margin does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gramlite.errors import InputError

LOCAL = 0.1  # the share of the layers' own errors in what is made small
ALONE = 2.0  # the weight of the matrices' own mean squares against that of the square of their sum
MOVES = 2000
EXCHANGED = 600  # options that an exchange of two is looked for among

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Option:
    """A type that a matrix can take: its bytes, the first-order change of each transcript's margin in nats, the share
    of the layer's output energy that is lost, and whether it is written with the importance matrix."""

    kind: str
    bytes: int
    changes: Doubles
    local: float = 0.0
    weighed: bool = False


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option for each matrix, their bytes within the budget, for a small square of the margins' changes.

    From the smallest options on, the change of one matrix's type that saves most per byte is made as long as one fits;
    then one or two types are changed at a time while that helps within the budget.
    Raises InputError where the smallest options don't fit.
    """
    table = OptionTable(options)
    least = sum(min(option.bytes for option in listed) for listed in options.values())
    if least > budget:
        raise InputError(
            f"Even the smallest types take {least:,} bytes and the target leaves {budget:,} for matrices. "
            "Ask for more bits per weight."
        )
    while table.best_single(budget, per_byte=True):
        pass
    for _ in range(MOVES):
        if not (table.best_single(budget, per_byte=False) or table.best_pair(budget)):
            break
    return table.chosen()


def unseen_changes(options: Mapping[str, Sequence[Option]], budget: int) -> Doubles:
    """The change of each transcript's margin by a choice that was made on the other half of the transcripts."""
    count = len(next(iter(options.values()))[0].changes)
    found = np.zeros(count)
    for half in (0, 1):
        learned = np.arange(count) % 2 == half
        parts = {
            name: [replace(option, changes=option.changes[learned]) for option in listed]
            for name, listed in options.items()
        }
        chosen = allocate(parts, budget)
        for name, option in chosen.items():
            found[~learned] += options[name][parts[name].index(option)].changes[~learned]
    return found


class OptionTable:
    """Every option of every matrix as a row, and which row each matrix has now."""

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self.names = list(options)
        self.rows = [option for listed in options.values() for option in listed]
        self.owner = np.repeat(np.arange(len(options)), [len(listed) for listed in options.values()])
        self.bytes = np.array([option.bytes for option in self.rows], dtype=np.int64)
        self.changes = np.stack([option.changes for option in self.rows])
        own = np.square(self.changes).mean(1)
        local = np.array([option.local for option in self.rows])
        start = [self._smallest(number) for number in range(len(self.names))]
        scale = LOCAL * own[start].sum() / max(float(local[start].sum()), 1e-30)
        self.alone = ALONE * own + scale * local
        self.now = np.array(start)
        self.rate = 0.0  # what the last byte spent has saved

    def _smallest(self, number: int) -> int:
        mine = np.flatnonzero(self.owner == number)
        return int(min(mine, key=lambda row: (self.bytes[row], np.square(self.changes[row]).mean())))

    def _moves(self) -> tuple[Doubles, Doubles, npt.NDArray[np.int64]]:
        """For every row: how the changes, the objective and the bytes would change if its matrix took it."""
        held = self.now[self.owner]
        step = self.changes - self.changes[held]
        total = self.changes[self.now].sum(0)
        worth = (2 * step @ total + np.square(step).sum(1)) / len(total) + self.alone - self.alone[held]
        return step, worth, self.bytes - self.bytes[held]

    def best_single(self, budget: int, *, per_byte: bool) -> bool:
        """Make the best change of one type; whether there was one that helps."""
        _, worth, cost = self._moves()
        room = budget - int(self.bytes[self.now].sum())
        value = np.where(cost > 0, worth / np.maximum(cost, 1), worth * 1e9) if per_byte else worth
        value = np.where((cost <= room) & (worth < -1e-12), value, 0.0)
        best = int(value.argmin())
        if value[best] >= 0:
            return False
        self.now[self.owner[best]] = best
        if per_byte and cost[best] > 0:
            self.rate = -float(value[best])
        return True

    def best_pair(self, budget: int) -> bool:
        """Make the best change of two matrices' types at once; whether there was one that helps."""
        step, worth, cost = self._moves()
        room = budget - int(self.bytes[self.now].sum())
        likely = np.argsort(worth + self.rate * cost, kind="stable")[:EXCHANGED]
        step, worth, cost, owner = step[likely], worth[likely], cost[likely], self.owner[likely]
        both = worth[:, None] + worth[None, :] + 2 * (step @ step.T) / step.shape[1]
        fits = (cost[:, None] + cost[None, :] <= room) & (owner[:, None] != owner[None, :])
        both = np.where(fits, both, 0.0)
        first, second = divmod(int(both.argmin()), len(likely))
        if both[first, second] >= -1e-12:
            return False
        self.now[owner[first]], self.now[owner[second]] = likely[first], likely[second]
        return True

    def chosen(self) -> dict[str, Option]:
        return {name: self.rows[row] for name, row in zip(self.names, self.now, strict=True)}
