"""The GGUF backend: llama.cpp through llama-cpp-python's low-level API.

One context with a unified KV cache holds every sequence. Sequence 0 is the trunk: the computed beginning that the
next prompt is likely to share (scaffold and instructions, then the question). A request shares the trunk's cells,
computes its own suffix in a sequence of its own, and only its last position's logits are asked for. Sequences that
are thinking take their steps together, each with a few tokens guessed ahead, whose logits tell how many were right.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from ..artifact import Artifact
from ..decoding import Generation, Logits
from ..device import DRAFT_TOKENS, Gpu, Machine, Offload, free_memory, plan_offload, thread_count
from ..drafting import CONTEXT_TOKENS, Drafter
from ..errors import GramliteError, ModelError, ResourceError
from ..gguf_header import Header, check_adapter_fits, read_header
from ..prompt import common_prefix
from ..quantization import quantization_name
from . import Request, RuntimeOptions

SPECIAL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
TRUNK = 0
NO_ROOM = 1  # llama_decode's return values
ABORTED = 2
TILE = 64  # smaller batches take another path of flash attention: a margin was 0.05 nats off there, 0.01 here

NO_MORE: Any = object()

_log_tail: deque[str] = deque(maxlen=40)
_started = threading.Lock()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, data: object) -> None:
    _log_tail.append(text.decode("utf-8", "replace"))


def _start_library() -> None:
    with _started:
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()


def _last_words() -> str:
    """What llama.cpp said last, for an error message."""
    lines = [line.strip() for line in "".join(_log_tail).splitlines() if "rror" in line or "fail" in line]
    return lines[-1] if lines else "no reason given"


def machine() -> Machine:
    """This machine as llama.cpp's build sees it."""
    if not llama_cpp.llama_supports_gpu_offload():
        return Machine(free_memory(), (), "this build of llama-cpp-python has no GPU support")
    return Machine(free_memory(), _gpus(), "llama.cpp found no GPU that answers")


def _gpus() -> list[Gpu]:
    """The CUDA devices that ggml enumerates, through its own device interface (ggml-backend.h)."""
    ending = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    folder = Path(llama_cpp.__file__).parent / "lib"
    try:
        library, base = (ctypes.CDLL(str(folder / f"lib{name}.{ending}")) for name in ("ggml", "ggml-base"))
    except OSError:
        return []
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    for describe in (base.ggml_backend_dev_name, base.ggml_backend_dev_description):
        describe.restype = ctypes.c_char_p
    found: list[Gpu] = []
    for index in range(library.ggml_backend_dev_count()):
        device = ctypes.c_void_p(library.ggml_backend_dev_get(ctypes.c_size_t(index)))
        if not (base.ggml_backend_dev_name(device) or b"").startswith(b"CUDA"):
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = (base.ggml_backend_dev_description(device) or b"GPU").decode("utf-8", "replace")
        found.append(Gpu(name, free.value, total.value, index=len(found)))
    return found


class LlamaVocabulary:
    """llama.cpp's tokenizer of one model."""

    def __init__(self, model: Any, *, normalize: bool) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._normalize = normalize
        self._buffer = ctypes.create_string_buffer(1024)
        self._pieces: dict[int, bytes] = {}
        self.size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        special = [t for t in range(self.size) if llama_cpp.llama_vocab_get_attr(self._vocab, t) & SPECIAL]
        self.special_tokens: Mapping[str, int] = {
            llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"): token for token in special
        }
        ends = [token for token in special if llama_cpp.llama_vocab_is_eog(self._vocab, token)]
        self.end_tokens = frozenset([*ends, int(llama_cpp.llama_vocab_eos(self._vocab))])

    def encode(self, text: str) -> list[int]:
        if self._normalize:
            text = unicodedata.normalize("NFC", text)
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, False, False)
        if count < 0:
            raise GramliteError(f"llama.cpp could not tokenize a text of {len(data)} bytes.")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            length = llama_cpp.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, False)
            known = self._pieces[token] = self._buffer.raw[: max(length, 0)]
        return known


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

    def __init__(self, header: Header, options: RuntimeOptions, adapter: Header | None) -> None:
        _start_library()
        self._model: Any = None
        self._context: Any = None
        self._adapter: Any = None
        self._batch: Any = None
        self.metadata = _metadata(header)
        plan = plan_offload(header, options, machine(), adapter=adapter)
        self.context = plan.context
        self.device = plan.device
        self._layout = plan.layout
        self._separate = options.deterministic
        self._drafter = None if options.deterministic else Drafter()
        try:
            self._load(header.path, options, plan)
        except BaseException:
            self.close()
            raise
        normalize = header.metadata.get("tokenizer.ggml.pre") == "qwen2"  # its tokenizer.json normalizes to NFC
        self.vocabulary = LlamaVocabulary(self._model, normalize=normalize)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._free = list(range(self._layout.parallel, 0, -1))
        self._trunk: tuple[int, ...] = ()
        self._orphans = 0  # cells of former trunks that running sequences still hold
        self._running: list[_Running] = []

    def _load(self, path: Path, options: RuntimeOptions, plan: Offload) -> None:
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = plan.gpu_layers
        model_params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
        model_params.main_gpu = plan.main_gpu
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise ModelError(f"llama.cpp could not load {path}: {_last_words()}. Export or download it again.")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = plan.context
        params.n_batch = params.n_ubatch = self._layout.micro_batch
        params.n_seq_max = plan.layout.parallel + 1
        params.n_outputs_max = plan.layout.outputs
        params.n_threads = params.n_threads_batch = thread_count(options.threads)
        params.kv_unified = True
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.offload_kqv = plan.gpu_layers > 0
        params.no_perf = True
        # strlen is the abort callback: native, so that asking it costs nothing; it says yes once the text is not empty
        self._abort_text = ctypes.create_string_buffer(2)
        address = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        self._abort_callback = llama_cpp.ggml_abort_callback(address)
        params.abort_callback = self._abort_callback
        params.abort_callback_data = ctypes.cast(self._abort_text, ctypes.c_void_p)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ResourceError(
                f"llama.cpp could not make a context of {plan.context:,} tokens: {_last_words()}. "
                "Try a smaller --context, or --device cpu."
            )
        if options.adapter:
            self._attach(options.adapter)
        self._batch = llama_cpp.llama_batch_init(self._layout.micro_batch, 0, 2)

    def _attach(self, path: str) -> None:
        self._adapter = llama_cpp.llama_adapter_lora_init(self._model, path.encode())
        if not self._adapter:
            raise ModelError(f"llama.cpp could not load the adapter {path}: {_last_words()}. Does it fit this model?")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._adapter)
        if llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise ModelError(f"llama.cpp could not apply the adapter {path}: {_last_words()}.")

    def generate(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Generation]]:
        """See Backend.generate; the order of what is yielded is that of finishing."""
        self._abort_text.value = b""
        waiting = iter(requests)
        more = True
        upcoming: Request | None = None
        try:
            while more or self._running:
                if more and not upcoming:
                    upcoming = next(waiting, NO_MORE)
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
                self._share(sequence, start)
                logits = self._prefill(prompt[start:], [sequence], start, trunk_until=end)
                break
            self._prefill(prompt[start:end], [TRUNK], start)
        else:
            start = max(0, min(shared, len(prompt) - TILE))
            self._share(sequence, start)
            logits = self._prefill(prompt[start:], [sequence], start)
        self._trunk = prompt[:shared]
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
            llama_cpp.llama_memory_seq_rm(self._memory, TRUNK, kept, -1)
            self._orphans += len(self._trunk) - kept if self._running else 0
        return kept

    def _share(self, sequence: int, length: int) -> None:
        """Let a sequence share the trunk's first cells."""
        if length:
            llama_cpp.llama_memory_seq_cp(self._memory, TRUNK, sequence, 0, length)

    def _prefill(
        self, tokens: Sequence[int], sequences: Sequence[int], position: int, *, trunk_until: int = 0
    ) -> Logits:
        """Compute tokens from `position` on; those before `trunk_until` belong to the trunk too. Returns the last logits."""
        parts = -(-len(tokens) // self._layout.micro_batch)
        for number in range(parts):
            start, end = (len(tokens) * edge // parts for edge in (number, number + 1))
            part = tokens[start:end]
            common = min(max(trunk_until - position - start, 0), len(part))
            self._batch.n_tokens = 0
            self._add(part[:common], [TRUNK, *sequences], position + start)
            self._add(part[common:], sequences, position + start + common)
            self._batch.logits[len(part) - 1] = end == len(tokens)
            self._decode()
        return self._logits(self._batch.n_tokens - 1)

    def _step(self) -> None:
        """Feed every running sequence's waiting tokens at once and let each go on from what it reads."""
        self._batch.n_tokens = 0
        first = []
        for running in self._running:
            self._add(running.waiting, [running.sequence], running.fed)
            running.fed += len(running.waiting)
            first.append(self._batch.n_tokens - 1)
            running.guessed = self._guess(running)
            self._add(running.guessed, [running.sequence], running.fed)
            for index in range(first[-1], self._batch.n_tokens):
                self._batch.logits[index] = True
        self._decode()
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
            running.waiting = running.request.decoder.advance(self._logits(index))
            self._hear(running)
            right = common_prefix(running.waiting, guessed)
            running.fed += right
            running.waiting, guessed = running.waiting[right:], guessed[right:]
            if not right or running.waiting:
                break
            index += right
        if guessed:
            llama_cpp.llama_memory_seq_rm(self._memory, running.sequence, running.fed, -1)

    def _hear(self, running: _Running) -> None:
        if self._drafter is not None:
            running.said += running.waiting
            self._drafter.learn(running.said, len(running.waiting))

    def _add(self, tokens: Sequence[int], sequences: Sequence[int], position: int) -> None:
        batch = self._batch
        base = batch.n_tokens
        for offset, token in enumerate(tokens):
            index = base + offset
            batch.token[index] = token
            batch.pos[index] = position + offset
            batch.n_seq_id[index] = len(sequences)
            for place, sequence in enumerate(sequences):
                batch.seq_id[index][place] = sequence
            batch.logits[index] = False
        batch.n_tokens = base + len(tokens)

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status == 0:
            return
        if status == ABORTED:
            raise GramliteError("The judging was stopped.")
        if status == NO_ROOM:
            raise ResourceError(f"The KV cache of {self.context:,} tokens is full. Try a larger --context.")
        raise GramliteError(f"llama.cpp failed ({status}): {_last_words()}.")

    def _logits(self, index: int) -> Logits:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise GramliteError(f"llama.cpp gave no logits: {_last_words()}.")
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary.size,))

    def _end(self, running: _Running) -> tuple[int, Generation]:
        llama_cpp.llama_memory_seq_rm(self._memory, running.sequence, -1, -1)
        self._free.append(running.sequence)
        if not self._running:
            self._orphans = 0
        return running.request.key, running.request.decoder.result(cached=running.cached)

    def _forget(self) -> None:
        """Drop everything that is computed, after a failure or an early end."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self._free = list(range(self._layout.parallel, 0, -1))
        self._running.clear()
        self._trunk = ()
        self._orphans = 0

    def abort(self) -> None:
        self._abort_text.value = b"x"

    def close(self) -> None:
        if self._batch:
            llama_cpp.llama_batch_free(self._batch)
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)  # frees its adapters too
        self._batch = self._context = self._model = self._adapter = None


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
    """Validate a GGUF file's header (and its adapter's), then open it.

    Raises ModelError for a file that is refused, ResourceError when it does not fit.
    """
    header = read_header(artifact.path)
    adapter = None
    if options.adapter:
        adapter = read_header(Path(options.adapter), expect="adapter")
        check_adapter_fits(adapter, header)
    return GgufBackend(header, options, adapter)
