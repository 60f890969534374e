"""The onnx backend: onnxruntime runs the graph that onnxruntime-genai's model builder makes.

Not onnxruntime-genai itself: with the graph's KV inputs and outputs bound to the same buffers, going back to a shared
prefix is a matter of the attention mask's length, a run can be stopped from another thread, and the runtime needs
neither a second tokenizer nor a second set of sampling rules. The builder's graphs give logits of the last position.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime

from gramlite.errors import GramliteError, InputError, ModelError, OutOfMemory, ResourceError
from gramlite.formats.artifact import Artifact
from gramlite.formats.model_folder import ModelFolder, read_model_folder
from gramlite.formats.onnx_graph import OnnxGraph, present_name, read_graph
from gramlite.generation.decoder import Logits
from gramlite.generation.tokenizer_json import read_vocabulary
from gramlite.runtime.machine import Machine, free_memory, has_driver, has_mps, thread_count
from gramlite.runtime.onnx_folder import GENAI, footprint, graph_name, head_size
from gramlite.runtime.options import RuntimeOptions
from gramlite.runtime.placement import Placement, place, placement_below
from gramlite.runtime.torch_devices import cuda_devices

from .fallback import Fallback
from .one_sequence import OneSequenceBackend

logger = logging.getLogger("gramlite")

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
OWN_THREADS = True  # each session makes its own, in a forked process too
CELLS = 512  # the KV buffers grow in steps of this many tokens

Below = Callable[[Placement, int | None], Placement | None]


def machine() -> Machine:
    """This machine as onnxruntime sees it; its build says whether it has CUDA, the driver how much memory is free."""
    if CUDA not in onnxruntime.get_available_providers():
        reason = (
            "this onnxruntime has no CUDA (pip install 'gramlite[onnx-cuda]' in an environment without onnxruntime)"
        )
        return Machine(free_memory(), (), reason, driver=has_driver(), mps=has_mps())
    reason = "torch, which onnxruntime's CUDA is asked about through, found no CUDA device that answers"
    return Machine(free_memory(), cuda_devices(), reason, driver=has_driver(), mps=has_mps())


class OnnxBackend(OneSequenceBackend):
    """An open ONNX folder. Use `open_artifact`."""

    def __init__(
        self,
        folder: ModelFolder,
        graph: OnnxGraph,
        placement: Placement,
        quantization: str | None,
        *,
        options: RuntimeOptions,
        below: Below,
    ) -> None:
        super().__init__()
        self._graph = graph
        self._options = options
        self._head_size = head_size(folder, graph)
        self._session: Any = None
        self._buffers: dict[str, Any] = {}
        self._run_options: Any = None
        self._lock = threading.Lock()
        self._fallback = Fallback(placement, load=self._load, free=self._free, below=below)
        self.metadata: Mapping[str, Any] = folder.describe(quantization)
        self.vocabulary = read_vocabulary(folder, graph.vocabulary)

    def _load(self, placement: Placement) -> Placement:
        self._session = open_session(self._graph, placement, self._options)
        if placement.gpu and CUDA not in self._session.get_providers():  # which onnxruntime does not say by itself
            refusal = "onnxruntime could not load its CUDA libraries"
            if self._options.device == "cuda":
                raise ResourceError(
                    f"--device cuda was asked for, but {refusal}. Type --device cpu, or: gramlite doctor"
                )
            logger.warning("Running on the CPU: %s.", refusal)
            placement = Placement(None, placement.context)
        self._gpu = placement.gpu
        self._cells = 0
        return placement

    def _free(self) -> None:
        self._buffers.clear()
        self._cells = 0
        self._session = None

    @property
    def device(self) -> str:
        return str(self._fallback.place.device)

    def _reserve(self, tokens: int) -> None:
        """See that the buffers hold `tokens`; larger ones start empty."""
        if tokens <= self._cells:
            return
        self._buffers.clear()
        self._drop()
        self._cells = min(-(-tokens // CELLS) * CELLS, max(self.context, tokens))
        shape = (1, self._graph.key_value_heads, self._cells, self._head_size)
        for name in self._graph.past:  # each from an array of its own: on the CPU an OrtValue uses the array's memory
            empty = np.zeros(shape, dtype=np.float16 if self._graph.half else np.float32)
            try:
                self._buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty, *self._where)
            except Exception as error:
                self._check_memory(error, tokens)
                raise GramliteError(f"onnxruntime failed at {tokens:,} tokens: {_first_line(error)}") from error

    @property
    def _where(self) -> tuple[str, int]:
        return ("cuda", self._gpu.index) if self._gpu else ("cpu", 0)

    def _compute(self, tokens: Sequence[int], position: int) -> Logits:
        total = position + len(tokens)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        binding.bind_output("logits", "cpu")
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present_name(name), buffer)
        options = onnxruntime.RunOptions()
        with self._lock:
            self._run_options = options
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # onnxruntime's kinds have no common parent but this
            if options.terminate:
                raise GramliteError("The judging was stopped.") from error
            self._check_memory(error, total)
            raise GramliteError(f"onnxruntime failed at {total:,} tokens: {_first_line(error)}") from error
        finally:
            with self._lock:
                self._run_options = None
        logits: Logits = np.array(binding.get_outputs()[0].numpy()[0, -1], dtype=np.float32)
        return logits

    def _check_memory(self, error: Exception, tokens: int) -> None:
        """Raise OutOfMemory where it is the GPU's memory that ran out."""
        if self._gpu and says_memory(error):
            raise OutOfMemory(f"at {tokens:,} tokens, {_first_line(error)}") from error

    def abort(self) -> None:
        super().abort()
        with self._lock:
            if self._run_options is not None:
                self._run_options.terminate = True

    def close(self) -> None:
        self._free()


def open_artifact(artifact: Artifact, options: RuntimeOptions) -> OnnxBackend:
    """Check an ONNX folder, then load it.

    Raises ModelError for a folder that is refused, InputError for an adapter, ResourceError when it does not fit.
    """
    if options.adapter:
        raise InputError("The onnx backend takes no --adapter. Merge it, then export the merged checkpoint.")
    if not artifact.path.is_dir():
        raise ModelError(f"{artifact.path} is no folder. Name the one with {GENAI} in it.")
    folder = read_model_folder(artifact.path)
    graph = read_graph(artifact.path / graph_name(artifact))
    found = machine()
    size = footprint(folder, graph)
    name, trained = folder.path.name, folder.context
    placement = place(name, trained, options, found, cpu=size, gpu=size if graph.half else None)

    def below(placement: Placement, context: int | None) -> Placement | None:
        asked = replace(options, context=context or options.context)
        return placement_below(placement, name, trained, asked, machine(), cpu=size)

    quantization = artifact.manifest.quantization if artifact.manifest else None
    return OnnxBackend(folder, graph, placement, quantization, options=options, below=below)


def open_session(graph: OnnxGraph, placement: Placement, options: RuntimeOptions) -> Any:
    """A session on the chosen device; raises ModelError for what onnxruntime refuses."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = thread_count(options.threads)
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4  # failures are raised, and the rest is said by us
    providers: list[Any] = [CPU]
    if placement.gpu:
        providers.insert(0, (CUDA, {"device_id": placement.gpu.index}))
    try:
        return onnxruntime.InferenceSession(str(graph.path), settings, providers=providers)
    except Exception as error:  # onnxruntime's kinds have no common parent but this
        text = _first_line(error)
        if says_memory(error):
            if placement.gpu:
                raise OutOfMemory(text) from error
            raise ResourceError(f"{graph.path} does not fit the memory: {text}. Free some of it.") from error
        raise ModelError(f"onnxruntime could not load {graph.path}: {text}. Export or download it again.") from error


def says_memory(error: Exception) -> bool:
    """Whether onnxruntime failed for want of memory; it has no kind of its own for that."""
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "failed to allocate memory", "cuda_error_out_of_memory"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__
