"""The GGUF backend: llama.cpp through llama-cpp-python's low-level API.

One context with a unified KV cache holds every sequence. Sequence 0 is the trunk: the computed beginning that the
next prompt is likely to share (scaffold and instructions, then the question). A request shares the trunk's cells,
computes its own suffix in a sequence of its own, and only its last position's logits are asked for. Votes ask for one
prompt again and again: it is computed once, and held with the logits that all of them begin from. Sequences that are
thinking take their steps together, those that have said the same so far as one, and where they are few each with some
tokens guessed ahead, whose logits tell how many were right.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from gramlite.backends.fallback import Fallback
from gramlite.backends.local import Door, LocalBackend
from gramlite.backends.protocol import Capabilities
from gramlite.formats.artifact import Artifact
from gramlite.formats.gguf_header import Header, check_adapter_fits, read_header
from gramlite.generation.drafting import CONTEXT_TOKENS, Drafter
from gramlite.generation.prompt import common_prefix
from gramlite.generation.request import Request
from gramlite.runtime.gguf_memory import DRAFT_TOKENS, MOST_DRAFTED, LayeredFootprint
from gramlite.runtime.options import RuntimeOptions
from gramlite.runtime.placement import GPU_MARGIN, Offload, offload_below, plan_offload

from .adapters import Adapters
from .cells import Lane, Running, batches, cells_of, likely_tokens
from .context import LlamaContext
from .library import machine
from .prompts import Prompts
from .vocabulary import LlamaVocabulary, judging_metadata

# that run together on a CPU, where every token's attention goes over the cells of all: 16 pairs, two orders each, took
# 39.4 s one after the other, 38.0 with four prompts at a time, 34.2 with eight, 40.6 with sixteen (Q8_0, two cores)
MOST_PROMPTS = 8


class GgufBackend(LocalBackend):
    """An open GGUF file. Use `open_artifact`."""

    note = ""  # what `device` says besides
    _opened: LlamaContext | None = None
    _fallback: Fallback[Offload]

    def __init__(self, header: Header, options: RuntimeOptions, adapters: Sequence[Header]) -> None:
        super().__init__()
        self.metadata = judging_metadata(header)
        self._header = header
        self._options = options
        self._drafter = None if options.deterministic else Drafter()
        self._vocabulary: LlamaVocabulary | None = None
        normalize = header.metadata.get("tokenizer.ggml.pre") == "qwen2"  # its tokenizer.json normalizes to NFC
        plan = plan_offload(header, options, machine(), adapters=adapters)
        self._layout = plan.layout

        def below(plan: Offload, context: int | None) -> Offload | None:
            asked = replace(options, context=context or options.context)
            return offload_below(plan, header, asked, machine(), adapters=adapters)

        try:
            if plan.gpu_layers:  # it outlives the model, which may be loaded again elsewhere
                self._vocabulary = LlamaVocabulary.of_file(header.path, normalize=normalize)
            self._fallback = Fallback(plan, load=self._load, free=self._unload, below=below)
            if self._vocabulary is None:
                self._vocabulary = LlamaVocabulary(self._llama.model, normalize=normalize)
            self.vocabulary = self._vocabulary
        except BaseException:
            self.close()
            raise

    def _load(self, plan: Offload) -> None:
        self._llama = self._opened = LlamaContext(self._header.path, plan, threads=self._options.threads)
        room = room_on_gpu if plan.gpu_layers else room_in_memory
        self._adapters = Adapters(self._llama, self._header, room)
        self._adapters.load(self._options.adapter)
        self._prompts = Prompts(self._llama, self._layout, separate=self._options.deterministic)
        self._memory = LayeredFootprint(self._header, self._layout).at(plan.context).total
        self._door = Door()
        self._sequences: list[Running] = []
        self._again: list[Request] = []  # what had to make room for others and starts again
        self._forget()

    def _unload(self) -> None:
        if self._opened:
            self._opened.close()

    @property
    def capabilities(self) -> Capabilities:
        sequences, cells = self._layout.parallel, self.context
        return Capabilities(sequences=sequences, cells=cells, context=cells, adapters=True, memory=self._memory)

    @property
    def device(self) -> str:
        return f"{self._fallback.place.device}{self.note}"

    @property
    def _running(self) -> int:
        return len(self._sequences) + len(self._again)

    def start(self, request: Request) -> bool:
        """See Backend.start."""
        self._fallback.require_loaded()
        self._require_fit(request)
        lane = Lane(request.adapter, request.alone or self._options.deterministic)
        if self._running:
            joins = lane == self._adapters.lane and not lane.alone
            waits = bool(self._again) or self._door.is_held_against(request.key)
            if not joins or waits or not self._has_room(request):
                return self._door.refuse(request.key)
        elif lane != self._adapters.lane:
            trunk = self._adapters.switch(lane, self._prompts.trunk)
            self._prompts.clear(trunk)
        else:
            self._has_room(request)
        self._add(request)
        return self._door.enter(request.key)

    def _add(self, request: Request) -> None:
        reserved = self._new_cells(request) + likely_tokens(request)
        self._sequences.append(Running(request, self._decoder(request), self._free.pop(), reserved))

    def cancel(self, key: Hashable) -> None:
        """See Backend.cancel."""
        self._door.forget(key)
        self._again = [request for request in self._again if request.key != key]
        for running in [one for one in self._sequences if one.request.key == key]:
            self._stop(running)

    def release(self, group: Hashable) -> None:
        """See Backend.release."""
        self._prompts.held.release(*self._prompts.held.of_group(group))

    def open_adapter(self, path: str | None) -> None:
        """See Backend.open_adapter."""
        self._fallback.require_loaded()
        self._adapters.open(path)

    def _advance(self) -> None:
        """Compute a piece of the first prompt that waits, and where none does a step of all that is thinking."""
        while self._again and self._has_room(self._again[-1]):
            self._add(self._again.pop())
        fresh = next((running for running in self._sequences if not running.begun), None)
        if fresh:
            fresh.beginning = fresh.beginning or self._begin(fresh)
            next(fresh.beginning, None)
        else:
            self._step()
        for running in [running for running in self._sequences if running.decoder.finished]:
            self._sequences.remove(running)
            self._release(running)
            self._end(running.request, running.decoder, running.cached)

    def _has_room(self, request: Request) -> bool:
        """Whether a request may start; prompts that are held make room for it where that is enough."""
        prompts = {running.request.prompt for running in self._sequences}
        crowded = len(prompts) >= MOST_PROMPTS and request.prompt not in prompts and not self._fallback.place.gpu_layers
        if crowded or not self._free:
            return False
        others = [prompt for prompt in self._prompts.held.prompts if prompt != request.prompt]
        for count in range(len(others) + 1):
            if self._fits(request, others[:count]):
                self._prompts.held.release(*others[:count])
                return True
        if not self._sequences:
            self._prompts.held.release(*self._prompts.held.prompts)
        return not self._sequences

    def _fits(self, request: Request, gone: Sequence[tuple[int, ...]]) -> bool:
        """Whether there are likely to be cells for a request once the prompts `gone` are held no more."""
        used = self._stem_cells(gone) + sum(running.likely for running in self._sequences)
        return used + self._new_cells(request) + likely_tokens(request) <= self.context

    def _new_cells(self, request: Request) -> int:
        """The cells that a request's prompt will take, none where it is computed as a whole or is going to be."""
        coming = any(running.request.prompt == request.prompt for running in self._sequences)
        shares = request.splits[-1:] == (len(request.prompt),) and coming
        return 0 if shares or self._prompts.holds(request) else len(request.prompt)

    def _stem_cells(self, gone: Sequence[tuple[int, ...]] = ()) -> int:
        return cells_of(
            [
                self._prompts.stem,
                *(running.stem for running in self._sequences),
                *self._prompts.held.stems(without=gone),
            ]
        )

    def _make_room(self) -> None:
        """Before a step: while the cells may not suffice, let go what only might be used again, then what began last."""
        while True:
            step = sum(len(running.waiting) + DRAFT_TOKENS for running in self._sequences)
            if self._stem_cells() + sum(running.own for running in self._sequences) + step <= self.context:
                return
            if self._prompts.held.prompts:
                self._prompts.held.release(self._prompts.held.prompts[0])
            elif self._prompts.trunk.tokens and self._prompts.stem not in (running.stem for running in self._sequences):
                self._prompts.cut_trunk(0)
            elif len(self._sequences) > 1:
                self._again.append(self._sequences[-1].request)
                self._stop(self._sequences[-1])
            else:
                return  # there is room for one: it was not let in without

    def _stop(self, running: Running) -> None:
        """Take a sequence's cells back; what comes of its request is as if it had not begun."""
        self._sequences.remove(running)
        if running.beginning and not running.begun:
            running.beginning.close()
            self._prompts.cut_trunk(len(self._prompts.trunk.tokens))
        self._release(running)

    def _release(self, running: Running) -> None:
        self._llama.cut(running.sequence, 0)
        self._free.append(running.sequence)

    def _begin(self, running: Running) -> Generator[None, None, None]:
        """Compute a request's prompt, a micro-batch between two yields, and take its first step."""
        prompt = running.request.prompt
        running.cached, stem = yield from self._prompts.begin(running.request, running.sequence)
        assert stem.logits is not None
        running.begun, running.fed, running.stem = True, len(prompt), stem
        running.said = list(prompt[-CONTEXT_TOKENS:])
        running.waiting = running.decoder.advance(stem.logits)
        self._learn(running)

    def _step(self) -> None:
        """Feed every running sequence's waiting tokens at once and let each go on from what it reads.

        Sequences that began from one prompt and have said the same since then share their cells and logits.
        """
        self._make_room()
        together: dict[tuple[int, ...], list[Running]] = {}
        for running in self._sequences:
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
        decoder = running.decoder
        if self._drafter is None or decoder.answering:
            return []
        room = len(running.request.prompt) + running.request.most_tokens - running.fed - len(running.waiting)
        return self._drafter.guess(running.said, min(DRAFT_TOKENS, room))

    def _read(self, running: Running, index: int) -> None:
        """Show a sequence's decoder its logits, from `index` on for as long as the guesses fed prove right."""
        guessed, right = running.guessed, 0
        while True:
            running.waiting = running.decoder.advance(self._llama.logits(index))
            self._learn(running)
            right = common_prefix(running.waiting, guessed)
            running.fed += right
            running.waiting, guessed = running.waiting[right:], guessed[right:]
            if not right or running.waiting:
                break
            index += right
        if guessed:
            self._llama.cut(running.sequence, running.fed)

    def _learn(self, running: Running) -> None:
        running.said += running.waiting
        if self._drafter is not None:
            self._drafter.learn(running.said, len(running.waiting))

    def _forget(self) -> None:
        """Drop everything that is started and computed."""
        self._llama.clear()
        self._free = list(range(self._layout.parallel, 0, -1))
        self._sequences.clear()
        self._again.clear()
        self._prompts.clear()

    def abort(self) -> None:
        """See Backend.abort."""
        super().abort()
        self._llama.abort()

    def _resume(self) -> None:
        super()._resume()
        self._llama.resume()

    def close(self) -> None:
        """Free the model; its vocabulary encodes no more."""
        if self._vocabulary:
            self._vocabulary.close()
        self._unload()


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
