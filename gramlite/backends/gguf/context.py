"""A model loaded by llama.cpp with one context: batches of tokens for its sequences, and their logits."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from gramlite.errors import GramliteError, ModelError, OutOfMemory, ResourceError
from gramlite.generation.decoder import Logits
from gramlite.interrupt import uninterrupted
from gramlite.runtime.machine import thread_count
from gramlite.runtime.placement import Offload

from .library import first_words, forget_words, last_words, memory_words, start_library

NO_ROOM = 1  # llama_decode's return values
ABORTED = 2
NO_MEMORY = -2

Saved = npt.NDArray[np.uint8]


class LlamaContext:
    """The model at `path` as planned; every sequence lies in one unified KV cache.

    A batch is filled with `add`, whose tokens give no logits unless `want` asks for them, and computed by `decode`.
    Where llama.cpp may have something to log, no KeyboardInterrupt is raised: the callback that hears it would lose it.
    Raises ModelError for a file that llama.cpp refuses, OutOfMemory where the GPU's memory runs out, ResourceError where
    the context does not fit.
    """

    def __init__(self, path: Path, plan: Offload, *, threads: int | None) -> None:
        start_library()
        forget_words()
        self.model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._size = plan.context
        self._most = plan.layout.micro_batch
        self._on_gpu = plan.gpu_layers > 0
        try:
            self._load(path, plan)
            self._make(plan, threads)
        except BaseException:
            self.close()
            raise

    @uninterrupted()
    def _load(self, path: Path, plan: Offload) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = plan.gpu_layers
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
        params.main_gpu = plan.main_gpu
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            self._check_memory()
            raise ModelError(f"llama.cpp could not load {path}: {first_words()}. Export or download it again.")
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model)))

    @uninterrupted()
    def _make(self, plan: Offload, threads: int | None) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = plan.context
        params.n_batch = params.n_ubatch = plan.layout.micro_batch
        params.n_seq_max = plan.layout.sequences
        params.n_outputs_max = plan.layout.outputs
        params.n_threads = params.n_threads_batch = thread_count(threads)
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
        self._context = llama_cpp.llama_init_from_model(self.model, params)
        if not self._context:
            self._check_memory()
            raise ResourceError(
                f"llama.cpp could not make a context of {plan.context:,} tokens: {first_words()}. "
                "Try a smaller --context, or --device cpu."
            )
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(plan.layout.micro_batch, 0, plan.layout.parallel + 1)

    def begin(self) -> None:
        """Start an empty batch."""
        self._batch.n_tokens = 0

    @property
    def filled(self) -> int:
        """How many tokens the batch holds."""
        return int(self._batch.n_tokens)

    def add(self, tokens: Sequence[int], sequences: Sequence[int], position: int) -> None:
        """Add tokens that stand from `position` on in each of the sequences."""
        batch = self._batch
        base = batch.n_tokens
        assert base + len(tokens) <= self._most, "llama.cpp does not check where a batch ends"
        for offset, token in enumerate(tokens):
            index = base + offset
            batch.token[index] = token
            batch.pos[index] = position + offset
            batch.n_seq_id[index] = len(sequences)
            for place, sequence in enumerate(sequences):
                batch.seq_id[index][place] = sequence
            batch.logits[index] = False
        batch.n_tokens = base + len(tokens)

    def want(self, index: int) -> None:
        """Ask for the logits of one of the batch's tokens."""
        self._batch.logits[index] = True

    @uninterrupted()
    def decode(self) -> None:
        """Compute the batch."""
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status == 0:
            return
        if status == ABORTED:
            raise GramliteError("The judging was stopped.")
        if status == NO_ROOM:
            raise ResourceError(f"The KV cache of {self._size:,} tokens is full. Try a larger --context.")
        if status == NO_MEMORY:
            self._check_memory("llama.cpp could not allocate what a batch needs")
        self._check_memory()
        raise GramliteError(f"llama.cpp failed ({status}): {last_words()}.")

    def _check_memory(self, reason: str | None = None) -> None:
        """Raise OutOfMemory where it is the GPU's memory that ran out, as llama.cpp says in words or as `reason` does."""
        words = memory_words() or reason
        if self._on_gpu and words:
            raise OutOfMemory(words)

    def logits(self, index: int) -> Logits:
        """The logits of a token that was wanted, shape (vocabulary,), valid until the next batch."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise GramliteError(f"llama.cpp gave no logits: {last_words()}.")
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def share(self, source: int, target: int, length: int) -> None:
        """Let a sequence share the first cells of another."""
        if length:
            llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, sequence: int, length: int) -> None:
        """Cut a sequence back to its first `length` tokens."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def clear(self) -> None:
        """Forget every sequence, also where none is left since the model was freed."""
        if self._context:
            llama_cpp.llama_memory_clear(self._memory, False)

    @uninterrupted()
    def save(self, sequence: int) -> Saved | None:
        """A copy of a sequence's cells in main memory; None where llama.cpp gives none."""
        size = int(llama_cpp.llama_state_seq_get_size(self._context, sequence))
        saved = np.empty(size, dtype=np.uint8)
        pointer = saved.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return saved if size and llama_cpp.llama_state_seq_get_data(self._context, pointer, size, sequence) else None

    @uninterrupted()
    def restore(self, sequence: int, saved: Saved) -> bool:
        """Put a saved sequence back; False where llama.cpp does not take it."""
        pointer = saved.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return bool(llama_cpp.llama_state_seq_set_data(self._context, pointer, saved.size, sequence))

    @uninterrupted()
    def open_adapter(self, path: str) -> Any:
        """Load a LoRA adapter, which is freed with the model; raises ModelError for one that llama.cpp refuses."""
        forget_words()
        adapter = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not adapter:
            self._check_memory()
            raise ModelError(f"llama.cpp could not load the adapter {path}: {first_words()}. Does it fit this model?")
        return adapter

    @uninterrupted()
    def set_adapters(self, adapters: Sequence[Any]) -> None:
        """Compute with these adapters together from here on."""
        count = len(adapters)
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*adapters)
        scales = (ctypes.c_float * count)(*([1.0] * count))
        if llama_cpp.llama_set_adapters_lora(self._context, pointers, count, scales):
            raise ModelError(f"llama.cpp could not apply {count} adapters: {last_words()}.")

    def abort(self) -> None:
        """Make a running or the next `decode` stop; safe to call from another thread."""
        self._abort_text.value = b"x"

    def resume(self) -> None:
        """Take an `abort` back."""
        self._abort_text.value = b""

    @uninterrupted()
    def close(self) -> None:
        batch, context, model = self._batch, self._context, self.model
        self._batch = self._context = self.model = None  # first, so that an interrupt leads to nothing freed twice
        if batch:
            llama_cpp.llama_batch_free(batch)
        if context:
            llama_cpp.llama_free(context)
        if model:
            llama_cpp.llama_model_free(model)  # frees its adapters too
