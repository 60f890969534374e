"""The GGUF backend: llama.cpp through llama-cpp-python's low-level API.

One context with a unified KV cache holds every sequence. Sequence 0 is the trunk: the computed beginning that the
next prompt is likely to share (scaffold and instructions, then the question). A request shares the trunk's cells,
computes its own suffix in a sequence of its own, and only its last position's logits are asked for. Votes ask for one
prompt again and again: it is computed once, and held with the logits that all of them begin from. Sequences that are
thinking take their steps together, those that have said the same so far as one, and where they are few each with some
tokens guessed ahead, whose logits tell how many were right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gramlite.backends.stepping_down import Finished, Steps
from gramlite.formats.artifact import Artifact
from gramlite.formats.gguf_header import Header, check_adapter_fits, read_header
from gramlite.generation.decoder import Generation, Logits
from gramlite.generation.drafting import CONTEXT_TOKENS, Drafter
from gramlite.generation.prompt import common_prefix
from gramlite.generation.request import Request
from gramlite.runtime.device import DRAFT_TOKENS, GPU_MARGIN, MOST_DRAFTED, Offload, offload_below, plan_offload
from gramlite.runtime.options import RuntimeOptions

from .adapters import Adapters
from .cells import TRUNK, HeldPrompts, Running, Stem, batches, cells_of, likely_tokens
from .context import LlamaContext
from .library import machine
from .vocabulary import LlamaVocabulary, judging_metadata

TILE = 64  # smaller batches take another path of flash attention: a margin was 0.05 nats off there, 0.01 here

NO_MORE: Any = object()


class GgufBackend:
    """An open GGUF file. Use `open_artifact`."""

    note = ""  # what `device` says besides
    _opened: LlamaContext | None = None

    def __init__(self, header: Header, options: RuntimeOptions, adapters: Sequence[Header]) -> None:
        self.metadata = judging_metadata(header)
        self._header = header
        self._options = options
        self._separate = options.deterministic
        self._drafter = None if options.deterministic else Drafter()
        self._wanted = options.adapter
        self._vocabulary: LlamaVocabulary | None = None
        plan = plan_offload(header, options, machine(), adapters=adapters)
        self._layout = plan.layout

        def below(plan: Offload, context: int | None) -> Offload | None:
            asked = replace(options, context=context or options.context)
            return offload_below(plan, header, asked, machine(), adapters=adapters)

        try:
            if plan.gpu_layers:  # it outlives the model, which may be loaded again elsewhere
                self._vocabulary = LlamaVocabulary.of_file(header.path, normalize=self._normalizes)
            self._steps = Steps(plan, load=self._load, free=self._unload, below=below)
        except BaseException:
            self.close()
            raise

    def _load(self, plan: Offload) -> None:
        self._llama = self._opened = LlamaContext(self._header.path, plan, threads=self._options.threads)
        room = room_on_gpu if plan.gpu_layers else room_in_memory
        self._adapters = Adapters(self._llama, self._header, room)
        self._adapters.load(self._wanted)
        self._free = list(range(self._layout.parallel, 0, -1))
        self._held = HeldPrompts(self._llama, range(self._layout.parallel + 1, self._layout.sequences))
        self._trunk: tuple[int, ...] = ()
        self._root = 0  # how much of the trunk all prompts share
        self._stem = Stem(0)  # the trunk's cells
        self._running: list[Running] = []
        self._again: list[Request] = []  # what had to make room for others and starts again

    def _unload(self) -> None:
        if self._opened:
            self._opened.close()

    @property
    def _normalizes(self) -> bool:
        return self._header.metadata.get("tokenizer.ggml.pre") == "qwen2"  # its tokenizer.json normalizes to NFC

    @property
    def vocabulary(self) -> LlamaVocabulary:
        if self._vocabulary is None:
            self._vocabulary = LlamaVocabulary(self._llama.model, normalize=self._normalizes)
        return self._vocabulary

    @property
    def context(self) -> int:
        return self._steps.place.context

    @property
    def device(self) -> str:
        return self._steps.place.device + self.note

    def use_adapter(self, path: str | None) -> None:
        """Judge with a LoRA adapter, or with none, from the next request on.

        An adapter is loaded once; see Adapters for what stays computed. Raises ModelError for one that does not fit
        the model, ResourceError when memory does not hold it.
        """
        self._steps.require_loaded()
        if path != self._adapters.active:
            self._trunk = self._adapters.switch(path, sequence=TRUNK, root=self._trunk[: self._root])
            self._root = len(self._trunk)
            self._stem = Stem(len(self._trunk))
            self._held.let_go(*self._held.prompts)
            self._wanted = path

    def generate(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Generation]]:
        """See Backend.generate; the order of what is yielded is that of finishing."""
        return self._steps.generate(requests, self._run)

    def _run(self, requests: Iterator[Request | None]) -> Finished:
        self._llama.go_on()
        self._again.clear()
        more = True
        upcoming: Request | None = None
        try:
            while more or upcoming or self._again or self._running:
                if self._again and not upcoming:
                    upcoming = self._again.pop()
                elif more and not upcoming:
                    upcoming = next(requests, NO_MORE)
                    more = upcoming is not NO_MORE
                    upcoming = upcoming if more else None
                if upcoming and upcoming.decoder.finished:
                    yield upcoming.key, upcoming.decoder.result()
                    upcoming = None
                elif upcoming and self._has_room(upcoming):
                    self._running.append(self._begin(upcoming))
                    upcoming = None
                elif self._running:
                    self._step()
                for running in [r for r in self._running if r.request.decoder.finished]:
                    self._running.remove(running)
                    yield self._end(running)
        except GeneratorExit:  # the caller has enough; what is computed stays, unless something was half way
            if self._running or self._again:
                self._forget()
            raise
        except BaseException:
            self._forget()
            raise

    def _has_room(self, request: Request) -> bool:
        """Whether a request may begin; prompts that are held make room for it where that is enough."""
        if self._running and not self._free:
            return False
        others = [prompt for prompt in self._held.prompts if prompt != request.prompt]
        for count in range(len(others) + 1):
            if self._fits(request, others[:count]):
                self._held.let_go(*others[:count])
                return True
        if not self._running:
            self._held.let_go(*self._held.prompts)
        return not self._running

    def _fits(self, request: Request, gone: Sequence[tuple[int, ...]]) -> bool:
        """Whether there are likely to be cells for a request once the prompts `gone` are held no more."""
        used = self._stem_cells(gone) + sum(running.likely for running in self._running)
        new = 0 if self._holds(request) else len(request.prompt)
        return used + new + likely_tokens(request) <= self.context

    def _stem_cells(self, gone: Sequence[tuple[int, ...]] = ()) -> int:
        return cells_of([self._stem, *(running.stem for running in self._running), *self._held.stems(without=gone)])

    def _make_room(self) -> None:
        """Before a step: while the cells may not suffice, let go what only might be used again, then what began last."""
        while True:
            step = sum(len(running.waiting) + DRAFT_TOKENS for running in self._running)
            if self._stem_cells() + sum(running.own for running in self._running) + step <= self.context:
                return
            if self._held.prompts:
                self._held.let_go(self._held.prompts[0])
            elif self._trunk and self._stem not in (running.stem for running in self._running):
                self._llama.cut(TRUNK, 0)
                self._trunk, self._root, self._stem = (), 0, Stem(0)
            elif len(self._running) > 1:
                self._again.append(self._stop(self._running[-1]))
            else:
                return  # there is room for one: it was not let in without

    def _stop(self, running: Running) -> Request:
        """Give a running sequence's cells back; its request is to begin again."""
        self._running.remove(running)
        self._release(running)
        running.request.decoder.restart()
        return running.request

    def _release(self, running: Running) -> None:
        self._llama.cut(running.sequence, 0)
        self._free.append(running.sequence)

    def _holds(self, request: Request) -> bool:
        """Whether a request begins from a prompt that is computed as a whole."""
        length = len(request.prompt)
        may = request.splits[-1:] == (length,) and (request.reuse is None or request.reuse >= length)
        return may and request.prompt in self._held

    def let_go(self, prompt: tuple[int, ...]) -> None:
        """See HoldsPrompts.let_go: its cells are needed by those that still run."""
        self._held.let_go(prompt)

    def _begin(self, request: Request) -> Running:
        """Compute a request's prompt and take its first step."""
        prompt, splits = request.prompt, request.splits
        shared = splits[-1] if splits else 0
        sequence = self._free.pop()
        if self._holds(request):
            kept, stem = len(prompt), self._held.share(prompt, sequence)
        else:
            kept = self._trim_trunk(request)
            ending = self._compute(prompt, sequence, kept, splits)
            stem = self._stem = Stem(shared, ending.copy())
            self._trunk, self._root = prompt[:shared], splits[0] if splits else 0
            if shared == len(prompt):
                self._held.hold(prompt, stem)
        assert stem.logits is not None
        running = Running(
            request,
            sequence,
            fed=len(prompt),
            cached=kept,
            waiting=request.decoder.advance(stem.logits),
            said=list(prompt[-CONTEXT_TOKENS:]),
            stem=stem,
        )
        self._hear(running)
        return running

    def _compute(self, prompt: Sequence[int], sequence: int, kept: int, splits: Sequence[int]) -> Logits:
        """Compute a prompt but its first `kept` tokens, up to the last split in the trunk, and let a sequence share it."""
        shared = splits[-1] if splits else 0
        for start, end in itertools.pairwise([kept, *(split for split in splits if split > kept)]):
            # the last stretch of the trunk goes together with what follows it
            if end == shared and not self._separate:
                self._llama.share(TRUNK, sequence, start)
                return self._prefill(prompt[start:], [sequence], start, trunk_until=end)
            logits = self._prefill(prompt[start:end], [TRUNK], start)
        if shared == len(prompt):
            self._llama.share(TRUNK, sequence, shared)
            return logits
        start = max(0, min(shared, len(prompt) - TILE))
        self._llama.share(TRUNK, sequence, start)
        return self._prefill(prompt[start:], [sequence], start)

    def _trim_trunk(self, request: Request) -> int:
        """Cut the trunk back to what this prompt shares with it, up to a split; returns how many tokens that is."""
        common = min(common_prefix(self._trunk, request.prompt), len(request.prompt) - 1)
        if request.reuse is not None:
            common = min(common, request.reuse)
        kept = max((split for split in request.splits if split <= common), default=0)
        if kept < len(self._trunk):
            self._llama.cut(TRUNK, kept)
        return kept

    def _prefill(
        self, tokens: Sequence[int], sequences: Sequence[int], position: int, *, trunk_until: int = 0
    ) -> Logits:
        """Compute tokens from `position` on; those before `trunk_until` belong to the trunk too. Returns the last logits."""
        parts = -(-len(tokens) // self._layout.micro_batch)
        for number in range(parts):
            start, end = (len(tokens) * edge // parts for edge in (number, number + 1))
            part = tokens[start:end]
            common = min(max(trunk_until - position - start, 0), len(part))
            self._llama.begin()
            self._llama.add(part[:common], [TRUNK, *sequences], position + start)
            self._llama.add(part[common:], sequences, position + start + common)
            if end == len(tokens):
                self._llama.want(len(part) - 1)
            self._llama.decode()
        return self._llama.logits(self._llama.filled - 1)

    def _step(self) -> None:
        """Feed every running sequence's waiting tokens at once and let each go on from what it reads.

        Sequences that began from one prompt and have said the same since then share their cells and logits.
        """
        self._make_room()
        together: dict[tuple[int, ...], list[Running]] = {}
        for running in self._running:
            together.setdefault(running.state, []).append(running)
        waiting = sum(len(alike[0].waiting) for alike in together.values())
        drafted = waiting + len(together) * DRAFT_TOKENS
        guesses = len(together) <= MOST_DRAFTED and drafted <= self._layout.micro_batch
        for batch in batches(together.values(), self._layout.micro_batch):
            self._feed(batch, guesses)

    def _feed(self, groups: Sequence[list[Running]], guesses: bool) -> None:
        """Compute one batch of what waits, and with `guesses` of what may follow it; let each sequence go on."""
        self._llama.begin()
        first = []
        for alike in groups:
            leader = alike[0]
            sequences = [running.sequence for running in alike]
            self._llama.add(leader.waiting, sequences, leader.fed)
            first.append(self._llama.filled - 1)
            guessed = self._guess(leader) if guesses else []
            self._llama.add(guessed, sequences, leader.fed + len(leader.waiting))
            for index in range(first[-1], self._llama.filled):
                self._llama.want(index)
            for running in alike:
                running.fed += len(leader.waiting)
                running.guessed = guessed
        self._llama.decode()
        for alike, index in zip(groups, first, strict=True):
            for running in alike:
                self._read(running, index)

    def _guess(self, running: Running) -> list[int]:
        """What a sequence may say next behind what waits, no more than it has room for."""
        decoder = running.request.decoder
        if self._drafter is None or decoder.answering:
            return []
        room = len(running.request.prompt) + decoder.most_tokens - running.fed - len(running.waiting)
        return self._drafter.guess(running.said, min(DRAFT_TOKENS, room))

    def _read(self, running: Running, index: int) -> None:
        """Show a sequence's decoder its logits, from `index` on for as long as the guesses fed prove right."""
        guessed, right = running.guessed, 0
        while True:
            running.waiting = running.request.decoder.advance(self._llama.logits(index))
            self._hear(running)
            right = common_prefix(running.waiting, guessed)
            running.fed += right
            running.waiting, guessed = running.waiting[right:], guessed[right:]
            if not right or running.waiting:
                break
            index += right
        if guessed:
            self._llama.cut(running.sequence, running.fed)

    def _hear(self, running: Running) -> None:
        running.said += running.waiting
        if self._drafter is not None:
            self._drafter.learn(running.said, len(running.waiting))

    def _end(self, running: Running) -> tuple[int, Generation]:
        self._release(running)
        return running.request.key, running.request.decoder.result(cached=running.cached)

    def _forget(self) -> None:
        """Drop everything that is computed, after a failure or an early end."""
        self._llama.clear()
        self._free = list(range(self._layout.parallel, 0, -1))
        self._running.clear()
        self._again.clear()
        self._held.let_go(*self._held.prompts)
        self._trunk, self._root, self._stem = (), 0, Stem(0)

    def abort(self) -> None:
        self._steps.abort()
        self._llama.abort()

    def close(self) -> None:
        self._unload()
        if self._vocabulary:
            self._vocabulary.close()


def room_in_memory() -> int:
    """Bytes of main memory that an adapter may take."""
    return machine().free_memory


def room_on_gpu() -> int:
    """Bytes of the freest GPU that an adapter may take; where layers are on it, adapters are too."""
    return int(max((gpu.free for gpu in machine().gpus), default=0) * (1 - GPU_MARGIN))


def open_artifact(artifact: Artifact, options: RuntimeOptions) -> GgufBackend:
    """Validate a GGUF file's header (and its adapters'), then open it.

    Raises ModelError for a file that is refused, ResourceError when it does not fit.
    """
    header = read_header(artifact.path)
    adapters = [read_header(Path(options.adapter), expect="adapter")] if options.adapter else []
    for adapter in adapters:
        check_adapter_fits(adapter, header)
    return GgufBackend(header, options, adapters)
