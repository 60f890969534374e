"""What lies in the cells of the KV cache: prompts that are shared, sequences that run, and how many cells they take."""

from __future__ import annotations

from collections.abc import Container, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gramlite.generation.decoder import Decoder, Logits
from gramlite.generation.request import Request

from .context import LlamaContext

TRUNK = 0
LIKELY_TOKENS = 256  # cells that a generation is given room for when it begins; few rationales are longer

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Lane:
    """What requests must have in common to run together: the adapter, and whether each of them runs alone."""

    adapter: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Trunk:
    """The computed beginning that the next prompt is likely to share: the first `root` tokens with all, more in its group."""

    tokens: Prompt = ()
    root: int = 0
    group: Hashable = None


@dataclass(frozen=True, eq=False)
class Stem:
    """Computed cells that several sequences may share: the beginning of a prompt, or a whole one and what follows it."""

    length: int
    logits: Logits | None = None


NOTHING = Stem(0)


@dataclass(eq=False)
class Running:
    """A request that was started: `fed` tokens are in the cache, `waiting` are fed in the next step.

    `said` is the prompt's end and all that was generated, `guessed` what the running step has fed behind `waiting`.
    `stem` is what it shares with the trunk that it began from; until it has begun, `reserved` cells are kept for it and
    `beginning` computes its prompt.
    """

    request: Request
    decoder: Decoder
    sequence: int
    reserved: int
    beginning: Generator[None, None, None] | None = None
    begun: bool = False
    fed: int = 0
    cached: int = 0
    waiting: Sequence[int] = ()
    said: list[int] = field(default_factory=list)
    stem: Stem = NOTHING
    guessed: list[int] = field(default_factory=list)

    @property
    def own(self) -> int:
        """Cells that it has beyond its stem's."""
        return self.fed - self.stem.length

    @property
    def likely(self) -> int:
        """Cells beyond its stem's that it has or is likely to need."""
        if not self.begun:
            return self.reserved
        return max(self.own, len(self.request.prompt) + likely_tokens(self.request) - self.stem.length)

    @property
    def state(self) -> tuple[int, ...]:
        """The same for two sequences that began from one whole prompt and have said the same since then."""
        whole = self.stem.length == len(self.request.prompt)
        return (id(self.stem if whole else self), self.fed, *self.said)


def likely_tokens(request: Request) -> int:
    """How many cells a generation is given room for when it begins."""
    return min(LIKELY_TOKENS, request.most_tokens)


def cells_of(stems: Iterable[Stem]) -> int:
    """The cells of stems, each counted once; beginnings that two of them share are counted twice."""
    return sum(stem.length for stem in set(stems))


def batches(groups: Iterable[list[Running]], most: int) -> Iterator[list[list[Running]]]:
    """Groups of sequences that step as one, in as few batches of at most `most` tokens as hold what waits in turn."""
    batch: list[list[Running]] = []
    filled = 0
    for alike in groups:
        waiting = len(alike[0].waiting)
        if batch and filled + waiting > most:
            yield batch
            batch, filled = [], 0
        batch.append(alike)
        filled += waiting
    if batch:
        yield batch


class HeldPrompts:
    """Whole prompts that stay computed while more generations of them may be asked for, in sequences of their own."""

    def __init__(self, llama: LlamaContext, sequences: Iterable[int]) -> None:
        self._llama = llama
        self._free = list(sequences)
        self._held: dict[Prompt, tuple[int, Stem, Hashable]] = {}  # the one that was not asked for longest first

    def __contains__(self, prompt: Prompt) -> bool:
        return prompt in self._held

    @property
    def prompts(self) -> list[Prompt]:
        """What is held, what was not asked for longest first."""
        return list(self._held)

    def of_group(self, group: Hashable) -> list[Prompt]:
        return [prompt for prompt, (_, _, its) in self._held.items() if its == group]

    def stems(self, *, without: Container[Prompt] = ()) -> list[Stem]:
        return [stem for prompt, (_, stem, _) in self._held.items() if prompt not in without]

    def hold(self, prompt: Prompt, stem: Stem, group: Hashable) -> None:
        """Keep the trunk, which is this prompt."""
        if prompt in self._held or not self._free:
            self.release(prompt if prompt in self._held else self.prompts[0])
        holder = self._free.pop()
        self._llama.share(TRUNK, holder, len(prompt))
        self._held[prompt] = holder, stem, group

    def share(self, prompt: Prompt, sequence: int) -> Stem:
        """Let a sequence begin from a prompt that is held."""
        holder, stem, _ = self._held[prompt] = self._held.pop(prompt)
        self._llama.share(holder, sequence, len(prompt))
        return stem

    def release(self, *prompts: Prompt) -> None:
        """Free the cells of prompts; one that is not held is no error."""
        for prompt in prompts:
            if prompt in self._held:
                holder, _, _ = self._held.pop(prompt)
                self._llama.cut(holder, 0)
                self._free.append(holder)
