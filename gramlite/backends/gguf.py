"""The GGUF backend: llama.cpp through llama-cpp-python's low-level API.

One context with a unified KV cache holds every sequence. Sequence 0 is the trunk: the computed beginning that the
next prompt is likely to share (scaffold and instructions, then the question). A request shares the trunk's cells,
computes its own suffix in a sequence of its own, and only its last position's logits are asked for. Sequences that
are thinking take their steps together, each with a few tokens guessed ahead, whose logits tell how many were right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artifact import Artifact
from ..decoding import Generation, Logits
from ..device import DRAFT_TOKENS, GPU_MARGIN, Offload, offload_below, plan_offload
from ..drafting import CONTEXT_TOKENS, Drafter
from ..errors import ModelError
from ..gguf_header import COMPANION, Header, check_adapter_fits, read_header
from ..prompt import common_prefix
from ..quantization import quantization_name
from ..stepping_down import Finished, Steps
from . import Request, RuntimeOptions
from .gguf_adapters import Adapters
from .gguf_context import LlamaContext
from .gguf_library import machine
from .gguf_vocabulary import LlamaVocabulary

TRUNK = 0
TILE = 64  # smaller batches take another path of flash attention: a margin was 0.05 nats off there, 0.01 here

NO_MORE: Any = object()


@dataclass
class _Running:
    """A request that has a sequence: `fed` tokens are in the cache, `waiting` are fed in the next step.

    `said` is the prompt's end and all that was generated, `guessed` what the running step has fed behind `waiting`.
    """

    request: Request
    sequence: int
    fed: int
    cached: int
    waiting: Sequence[int]
    own: int  # cells that it may come to need beyond the trunk's
    said: list[int]
    guessed: list[int] = field(default_factory=list)


class GgufBackend:
    """An open GGUF file. Use `open_artifact`."""

    note = ""  # what `device` says besides
    _opened: LlamaContext | None = None

    def __init__(self, header: Header, options: RuntimeOptions, adapters: Sequence[Header]) -> None:
        self.metadata = _metadata(header)
        self._header = header
        self._options = options
        self._separate = options.deterministic
        self._drafter = None if options.deterministic else Drafter()
        self._wanted = self._together(options.adapter)
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
        self._trunk: tuple[int, ...] = ()
        self._root = 0  # how much of the trunk all prompts share
        self._orphans = 0  # cells of former trunks that running sequences still hold
        self._running: list[_Running] = []

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

    def _together(self, adapter: str | None) -> tuple[str, ...]:
        return tuple(path for path in (self._options.companion, adapter) if path)

    def use_adapter(self, path: str | None) -> None:
        """Judge with a LoRA adapter, or with none, from the next request on; the model's companion stays in force.

        An adapter is loaded once; see Adapters for what stays computed. Raises ModelError for one that does not fit
        the model, ResourceError when memory does not hold it.
        """
        wanted = self._together(path)
        if wanted != self._adapters.active:
            self._trunk = self._adapters.switch(wanted, sequence=TRUNK, root=self._trunk[: self._root])
            self._root = len(self._trunk)
            self._wanted = wanted

    def generate(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Generation]]:
        """See Backend.generate; the order of what is yielded is that of finishing."""
        return self._steps.generate(requests, self._run)

    def _run(self, requests: Iterator[Request | None]) -> Finished:
        self._llama.go_on()
        more = True
        upcoming: Request | None = None
        try:
            while more or self._running:
                if more and not upcoming:
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
            if self._running:
                self._forget()
            raise
        except BaseException:
            self._forget()
            raise

    def _has_room(self, request: Request) -> bool:
        if not self._running:
            return True
        if not self._free:
            return False
        used = len(self._trunk) + self._orphans + sum(running.own for running in self._running)
        return used + len(request.prompt) + request.decoder.most_tokens <= self.context

    def _begin(self, request: Request) -> _Running:
        """Compute a request's prompt and take its first step."""
        prompt, splits = request.prompt, request.splits
        kept = self._trim_trunk(request)
        shared = splits[-1] if splits else 0
        sequence = self._free.pop()
        for start, end in itertools.pairwise([kept, *(split for split in splits if split > kept)]):
            # the last stretch of the trunk goes together with what follows it
            if end == shared and not self._separate:
                self._llama.share(TRUNK, sequence, start)
                logits = self._prefill(prompt[start:], [sequence], start, trunk_until=end)
                break
            self._prefill(prompt[start:end], [TRUNK], start)
        else:
            start = max(0, min(shared, len(prompt) - TILE))
            self._llama.share(TRUNK, sequence, start)
            logits = self._prefill(prompt[start:], [sequence], start)
        self._trunk, self._root = prompt[:shared], splits[0] if splits else 0
        running = _Running(
            request,
            sequence,
            fed=len(prompt),
            cached=kept,
            waiting=request.decoder.advance(logits),
            own=len(prompt) - shared + request.decoder.most_tokens,
            said=list(prompt[-CONTEXT_TOKENS:]),
        )
        self._hear(running)
        return running

    def _trim_trunk(self, request: Request) -> int:
        """Cut the trunk back to what this prompt shares with it, up to a split; returns how many tokens that is."""
        common = common_prefix(self._trunk, request.prompt)
        if request.reuse is not None:
            common = min(common, request.reuse)
        kept = max((split for split in request.splits if split <= common), default=0)
        if kept < len(self._trunk):
            self._llama.cut(TRUNK, kept)
            self._orphans += len(self._trunk) - kept if self._running else 0
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
        """Feed every running sequence's waiting tokens at once and let each go on from what it reads."""
        self._llama.begin()
        first = []
        for running in self._running:
            self._llama.add(running.waiting, [running.sequence], running.fed)
            running.fed += len(running.waiting)
            first.append(self._llama.filled - 1)
            running.guessed = self._guess(running)
            self._llama.add(running.guessed, [running.sequence], running.fed)
            for index in range(first[-1], self._llama.filled):
                self._llama.want(index)
        self._llama.decode()
        for running, index in zip(self._running, first, strict=True):
            self._read(running, index)

    def _guess(self, running: _Running) -> list[int]:
        """What a sequence may say next, no more than it has room for."""
        decoder = running.request.decoder
        if self._drafter is None or decoder.answering:
            return []
        room = len(running.request.prompt) + decoder.most_tokens - running.fed
        return self._drafter.guess(running.said, min(DRAFT_TOKENS, room))

    def _read(self, running: _Running, index: int) -> None:
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

    def _hear(self, running: _Running) -> None:
        if self._drafter is not None:
            running.said += running.waiting
            self._drafter.learn(running.said, len(running.waiting))

    def _end(self, running: _Running) -> tuple[int, Generation]:
        self._llama.cut(running.sequence, 0)
        self._free.append(running.sequence)
        if not self._running:
            self._orphans = 0
        return running.request.key, running.request.decoder.result(cached=running.cached)

    def _forget(self) -> None:
        """Drop everything that is computed, after a failure or an early end."""
        self._llama.clear()
        self._free = list(range(self._layout.parallel, 0, -1))
        self._running.clear()
        self._trunk, self._root = (), 0
        self._orphans = 0

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


def _metadata(header: Header) -> dict[str, Any]:
    """What judging wants to know of a GGUF file."""
    values = header.metadata
    tokens = values.get("tokenizer.ggml.tokens")

    def literal(kind: str) -> str:
        index = values.get(f"tokenizer.ggml.{kind}_token_id")
        return tokens[index] if isinstance(index, int) and isinstance(tokens, tuple) else ""

    template = {key: values.get(f"gramlite.template.{key}") for key in ("name", "sha256", "text")}
    return {
        "quantization": quantization_name(header),
        "chat_template": values.get("tokenizer.chat_template"),
        "template": template if any(template.values()) else None,
        "bos": literal("bos"),
        "eos": literal("eos"),
    }


def open_artifact(artifact: Artifact, options: RuntimeOptions) -> GgufBackend:
    """Validate a GGUF file's header (and its adapters'), then open it.

    Raises ModelError for a file that is refused, ResourceError when it does not fit.
    """
    header = read_header(artifact.path)
    companion = header.metadata.get(COMPANION)
    if companion and not options.companion:
        raise ModelError(
            f"{artifact.path} is only right together with the adapter {companion!r}, and its manifest, which says so, is "
            f"missing. Put both beside it, under their own names, or make the file again."
        )
    adapters = [read_header(Path(path), expect="adapter") for path in (options.companion, options.adapter) if path]
    for adapter in adapters:
        check_adapter_fits(adapter, header)
    return GgufBackend(header, options, adapters)
