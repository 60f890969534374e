"""Prompts computed by llama.cpp: the trunk, which the next one is likely to share, and whole ones that votes begin from."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence

from gramlite.generation.decoder import Logits
from gramlite.generation.prompt import common_prefix
from gramlite.generation.request import Request
from gramlite.runtime.gguf_memory import Layout

from .cells import TRUNK, HeldPrompts, Stem, Trunk
from .context import LlamaContext

LAST_TILE = 64  # smaller batches take another path of flash attention: a margin was 0.05 nats off there, 0.01 here


class Prompts:
    """What is computed of prompts in one context. With `separate` no two stretches between splits go together."""

    def __init__(self, llama: LlamaContext, layout: Layout, *, separate: bool) -> None:
        self.held = HeldPrompts(llama, range(layout.parallel + 1, layout.sequences))
        self._llama = llama
        self._micro_batch = layout.micro_batch
        self._separate = separate
        self.clear()

    def clear(self, trunk: Trunk | None = None) -> None:
        """Hold no whole prompt, and have this trunk."""
        self.held.release(*self.held.prompts)
        self.trunk = trunk or Trunk()
        self.stem = Stem(len(self.trunk.tokens))  # the trunk's cells

    def cut_trunk(self, length: int) -> None:
        """Forget what the trunk has beyond its first tokens."""
        self._llama.cut(TRUNK, length)
        trunk = self.trunk
        self.trunk = Trunk(trunk.tokens[:length], min(trunk.root, length), trunk.group)
        if not length:
            self.stem = Stem(0)

    def holds(self, request: Request) -> bool:
        """Whether a request begins from a prompt that is computed as a whole."""
        return request.splits[-1:] == (len(request.prompt),) and request.prompt in self.held

    def begin(self, request: Request, sequence: int) -> Generator[None, None, tuple[int, Stem]]:
        """Compute a request's prompt, a micro-batch between two yields.

        Returns how many of its tokens were there before, and the stem that it begins from.
        """
        prompt, splits = request.prompt, request.splits
        if self.holds(request):
            return len(prompt), self.held.share(prompt, sequence)
        shared = splits[-1] if splits else 0
        kept = self._trim_trunk(request)
        logits = yield from self._compute(prompt, sequence, kept, splits)
        self.trunk = Trunk(prompt[:shared], splits[0] if splits else 0, request.group)
        self.stem = Stem(shared, logits.copy())
        if shared == len(prompt):
            self.held.hold(prompt, self.stem, request.group)
        return kept, self.stem

    def _compute(
        self, prompt: Sequence[int], sequence: int, kept: int, splits: Sequence[int]
    ) -> Generator[None, None, Logits]:
        """Compute a prompt but its first `kept` tokens, up to the last split in the trunk, and let a sequence share it."""
        shared = splits[-1] if splits else 0
        logits: Logits
        for start, end in itertools.pairwise([kept, *(split for split in splits if split > kept)]):
            # the last stretch of the trunk goes together with what follows it
            if end == shared and not self._separate:
                self._llama.share(TRUNK, sequence, start)
                return (yield from self.prefill(prompt[start:], [sequence], start, trunk_until=end))
            logits = yield from self.prefill(prompt[start:end], [TRUNK], start)
            yield
        if shared == len(prompt):
            self._llama.share(TRUNK, sequence, shared)
            return logits
        start = max(0, min(shared, len(prompt) - LAST_TILE))
        self._llama.share(TRUNK, sequence, start)
        return (yield from self.prefill(prompt[start:], [sequence], start))

    def _trim_trunk(self, request: Request) -> int:
        """Cut the trunk back to what this prompt shares with it, up to a split; returns how many tokens that is.

        Beyond the first split only a prompt of the same group shares it, so that each is computed in the same pieces
        whatever came before it.
        """
        common = min(common_prefix(self.trunk.tokens, request.prompt), len(request.prompt) - 1)
        if request.group != self.trunk.group:
            common = min([common, *request.splits[:1]])
        kept = max((split for split in request.splits if split <= common), default=0)
        if kept < len(self.trunk.tokens):
            self.cut_trunk(kept)
        return kept

    def prefill(
        self, tokens: Sequence[int], sequences: Sequence[int], position: int, *, trunk_until: int = 0
    ) -> Generator[None, None, Logits]:
        """Compute tokens from `position` on; those before `trunk_until` belong to the trunk too. Returns the last logits."""
        parts = -(-len(tokens) // self._micro_batch)
        for number in range(parts):
            start, end = (len(tokens) * edge // parts for edge in (number, number + 1))
            if number:
                yield
            part = tokens[start:end]
            common = min(max(trunk_until - position - start, 0), len(part))
            self._llama.begin()
            self._llama.add(part[:common], [TRUNK, *sequences], position + start)
            self._llama.add(part[common:], sequences, position + start + common)
            if end == len(tokens):
                self._llama.want(len(part) - 1)
            self._llama.decode()
        return self._llama.logits(self._llama.filled - 1)
