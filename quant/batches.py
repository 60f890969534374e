"""Transcripts side by side, and what they all begin with computed once.

A judge's prompts share their template: on the reference judge every second token is the same in all transcripts. As
attention looks back only, what a layer makes of that prefix is the same in all of them too. It is one sequence of its
own, and the transcripts' rest attends to its keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .calibration import Transcript

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024
LEAST_PREFIX = 16


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids from position `start`, by the number of their transcript.

    Before `start` stands the prefix of all transcripts. The prefix itself has the number None. Where sequences of
    unlike length are laid side by side, [sequences, longest, ...], the shorter ones are padded to the right: nothing
    looks ahead, so what stands there is never read.
    """

    numbers: tuple[int | None, ...]
    sequences: tuple[tuple[int, ...], ...]
    start: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.sequences))

    @property
    def shape(self) -> tuple[int, int]:
        """How many sequences, and the longest one's tokens."""
        return len(self.sequences), max(self.lengths)

    @property
    def is_prefix(self) -> bool:
        return self.numbers == (None,)

    def spread(self, table: torch.Tensor) -> torch.Tensor:
        """Each token's row of a table, [sequences, longest, width], with nothing where no token stands."""
        import torch

        laid = torch.zeros(*self.shape, table.shape[1], dtype=table.dtype)
        for row, ids in enumerate(self.sequences):
            laid[row, : len(ids)] = table[torch.tensor(ids)]
        return laid

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """What belongs to tokens of states [sequences, longest, width], one after the other, [tokens, width]."""
        import torch

        if len(set(self.lengths)) == 1:
            return states.flatten(0, 1)
        return torch.cat([states[row, :length] for row, length in enumerate(self.lengths)])


def lay_out(transcripts: Sequence[Transcript], *, share: bool = True, verdicts: bool = True) -> list[Batch]:
    """Batches of at most 1,024 tokens each (or one transcript), transcripts of like length together.

    The first is the prefix, where one of some length is shared. Without `verdicts` each transcript's last token is left
    out.
    """
    sequences = [transcript.ids if verdicts else transcript.ids[:-1] for transcript in transcripts]
    start = common_length(sequences) if share else 0
    prefix = [Batch((None,), (sequences[0][:start],), 0)] if start else []
    return prefix + list(_batches(sequences, start))


def _batches(sequences: Sequence[tuple[int, ...]], start: int) -> Iterator[Batch]:
    numbers: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda number: -len(sequences[number])):
        longest = len(sequences[numbers[0] if numbers else number]) - start
        if numbers and (len(numbers) + 1) * longest > BATCH_TOKENS:
            yield _batch(numbers, sequences, start)
            numbers = []
        numbers.append(number)
    yield _batch(numbers, sequences, start)


def _batch(numbers: Sequence[int], sequences: Sequence[tuple[int, ...]], start: int) -> Batch:
    return Batch(tuple(numbers), tuple(sequences[number][start:] for number in numbers), start)


def common_length(sequences: Sequence[tuple[int, ...]]) -> int:
    """The tokens that all sequences begin with, so that of each at least one is left; 0 where they are few."""
    first, last = min(sequences), max(sequences)
    limit = min(map(len, sequences)) - 1
    length = next((place for place in range(limit) if first[place] != last[place]), limit)
    return length if length >= LEAST_PREFIX and len(sequences) > 1 else 0


class SharedPrefix:
    """A layer's keys and values of the prefix: taken when the prefix passes, put before those of batches that follow.

    It goes in the place of transformers' cache.
    """

    def __init__(self) -> None:
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *place: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if self._kept is None:
            self._kept = keys, values
            return keys, values
        before = [kept.expand(len(keys), -1, -1, -1) for kept in self._kept]
        return torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)

    def mask(self, batch: Batch, device: str) -> torch.Tensor | None:
        """Who may look at whom [1, 1, longest, start + longest], None where that is plainly causal."""
        import torch

        longest = batch.shape[1]
        if not batch.start or longest == 1:
            return None
        return torch.ones(longest, batch.start + longest, dtype=torch.bool, device=device).tril(batch.start)[None, None]
