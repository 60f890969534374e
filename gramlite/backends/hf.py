"""The hf backend: a checkpoint's folder through transformers, full precision or bitsandbytes, on CUDA or the CPU.

Only safetensors are read and no code that comes with a model is run. One sequence at a time: correctness first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers

from gramlite.errors import GramliteError, InputError, ModelError, OutOfMemory
from gramlite.formats.artifact import Artifact
from gramlite.formats.model_folder import ModelFolder, read_model_folder
from gramlite.generation.decoder import Logits
from gramlite.generation.tokenizer_json import read_vocabulary
from gramlite.runtime.folder_memory import (
    ITEM_BYTES,
    bytes_when_quantized,
    footprint,
    quantization_of,
    stored_bytes,
    stored_type,
)
from gramlite.runtime.machine import thread_count
from gramlite.runtime.options import LoadIn, RuntimeOptions
from gramlite.runtime.placement import Placement, place, placement_below
from gramlite.runtime.torch_devices import machine

from .cache_keyword import with_cache
from .fallback import Fallback
from .one_sequence import OneSequenceBackend

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LOADS_IN = {"nf4": 4.5, "int8": 8.1}  # bits a weight takes, its share of the scales included
MEMORY_WORDS = ("out of memory", "ALLOC_FAILED")  # of CUDA's own libraries, for which torch has no kind
Load = Callable[[Placement], tuple[Any, Any]]  # the model and its dtype
Below = Callable[[Placement, int | None], Placement | None]


class HfBackend(OneSequenceBackend):
    """An open checkpoint. Use `open_artifact`."""

    def __init__(
        self, folder: ModelFolder, placement: Placement, quantization: str, *, load: Load, below: Below
    ) -> None:
        super().__init__()
        self._open = load
        self._model: Any
        self._fallback = Fallback(placement, load=self._load, free=self._free, below=below)
        self.metadata: Mapping[str, Any] = folder.describe(quantization)
        self.vocabulary = read_vocabulary(folder, int(self._model.get_input_embeddings().num_embeddings))

    def _load(self, placement: Placement) -> None:
        self._model, dtype = self._open(placement)
        self._device = self._model.device
        self._dtype = str(dtype).removeprefix("torch.")
        self._cache = self._empty()

    def _empty(self) -> Any:
        config = self._model.config
        # the cache of an attention with a window forgets what it passes, and cannot be cropped then
        return transformers.DynamicCache(config=None if getattr(config, "sliding_window", None) else config)

    def _free(self) -> None:
        self._model = self._cache = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def device(self) -> str:
        return f"{self._fallback.place.device}, {self._dtype}"

    def _compute(self, tokens: Sequence[int], position: int) -> Logits:
        held = self._cache.get_seq_length()
        if position < held:
            self._cache.crop(position - held)
        ids = torch.tensor([list(tokens)], device=self._device)
        try:
            with torch.inference_mode(), quiet():
                output = self._model(ids, use_cache=True, logits_to_keep=1, **with_cache(self._model, self._cache))
        except BaseException as error:
            self._cache = self._empty()  # some layers may have got further than others
            if isinstance(error, RuntimeError):
                self._say(error, position + len(tokens))
            raise
        logits: Logits = output.logits[0, -1].float().cpu().numpy()
        return logits

    def _say(self, error: RuntimeError, tokens: int) -> None:
        """Raise what an error of torch means."""
        if says_memory(error, on_gpu=self._fallback.place.gpu is not None):
            raise OutOfMemory(f"at {tokens:,} tokens, {first_line(error)}") from error
        raise GramliteError(f"torch failed at {tokens:,} tokens: {first_line(error)}") from error

    def close(self) -> None:
        self._free()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of the libraries below, which say nothing that a user can act on."""
    from transformers.utils import logging as chatter

    shown, level = chatter.is_progress_bar_enabled(), chatter.get_verbosity()
    below = logging.getLogger("bitsandbytes")
    level_below = below.level
    chatter.disable_progress_bar()
    chatter.set_verbosity_error()
    below.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        below.setLevel(level_below)
        if shown:
            chatter.enable_progress_bar()


def open_artifact(artifact: Artifact, options: RuntimeOptions) -> HfBackend:
    """Check a checkpoint's files, then load it.

    Raises ModelError for a folder that is refused, InputError for an adapter, ResourceError when it does not fit.
    """
    if options.adapter:
        raise InputError("The hf backend takes no --adapter. Merge it: gramlite export merge CHECKPOINT ADAPTER -o OUT")
    if not artifact.path.is_dir():
        raise ModelError(f"{artifact.path} is no checkpoint's folder.")
    folder = read_model_folder(artifact.path)
    method = quantization_method(folder)
    if options.load_in:
        if method:
            raise InputError(f"{folder.path} is quantized already ({method}). Drop --load-in.")
        need_bitsandbytes(f"--load-in {options.load_in} needs")
        method = options.load_in.upper()
        sizes = bytes_when_quantized(artifact.path, LOADS_IN[options.load_in])
    else:
        sizes = stored_bytes(artifact.path)
    kind = stored_type(folder.path, sizes)
    stored = DTYPES[kind]
    found = machine()
    wide = footprint(folder, sizes, 4)
    own = footprint(folder, sizes, ITEM_BYTES[kind])
    fits = wide.total(options.context or 1) <= found.free_memory
    size = wide if fits else own
    name, trained = folder.path.name, folder.context
    placement = place(name, trained, options, found, cpu=size, gpu=own)
    torch.set_num_threads(thread_count(options.threads))

    def load(placement: Placement) -> tuple[Any, Any]:
        dtype = stored if placement.gpu or not fits else torch.float32
        return load_model(folder, placement, dtype, load_in=options.load_in), dtype

    def below(placement: Placement, context: int | None) -> Placement | None:
        asked = replace(options, context=context or options.context)
        return placement_below(placement, name, trained, asked, machine(), cpu=size)

    return HfBackend(folder, placement, method or kind, load=load, below=below)


def quantization_method(folder: ModelFolder) -> str | None:
    """NF4, FP4 or INT8 for a bitsandbytes folder, None for full precision; raises ModelError for anything else."""
    method = quantization_of(folder)
    if method and method.startswith("GPTQ"):
        raise ModelError(f"{folder.path} is quantized with 'gptq', which the hf backend does not run.")
    if method:
        need_bitsandbytes(f"{folder.path} needs")
    return method


def need_bitsandbytes(what: str) -> None:
    """Raise ModelError where bitsandbytes is missing."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{what} bitsandbytes. Type: pip install 'gramlite[bnb]'") from error


def compute_in(model: Any, dtype: Any) -> None:
    """Let a bitsandbytes model compute in `dtype`, as transformers does not once it was saved.

    On processors with AVX512-BF16 the 4-bit layers would round to bfloat16 all the same.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():  # quantized weights are integers
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu and dtype is torch.bfloat16


def settings_of(load_in: LoadIn, dtype: Any) -> Any:
    """The settings of bitsandbytes that `gramlite quantize bnb` has, too."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=load_in == "nf4",
        load_in_8bit=load_in == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def load_model(folder: ModelFolder, placement: Placement, dtype: Any, *, load_in: LoadIn | None = None) -> Any:
    """The model in evaluation mode, on its device; raises ModelError for what transformers refuses.

    `load_in` quantizes its linear layers, from the type that they are stored in.
    """
    where = f"cuda:{placement.gpu.index}" if placement.gpu else "cpu"
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
            quantization = getattr(config, "quantization_config", None)
            bitsandbytes = isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes"
            if load_in:
                quantization, bitsandbytes = settings_of(load_in, dtype), True
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder.path,
                config=config,
                dtype="auto" if load_in else dtype,
                quantization_config=quantization if load_in else None,
                device_map={"": where} if quantization else None,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are refused by name below
                output_loading_info=True,
            )
            model = (model if quantization else model.to(where)).eval()
            if bitsandbytes:
                compute_in(model, dtype)
    except Exception as error:  # of whatever kind: the files it reads are somebody else's
        if says_memory(error, on_gpu=placement.gpu is not None):
            raise OutOfMemory(first_line(error)) from error
        raise ModelError(f"transformers could not load {folder.path}: {first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):  # transformers would go on with random weights
        if found.get(what):
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found[what])
            raise ModelError(
                f"{folder.path} has {len(names)} {what.replace('_', ' ')}, {names[0]} first. Download it again."
            )
    return model


def says_memory(error: Exception, *, on_gpu: bool) -> bool:
    """Whether it is the GPU's memory that ran out."""
    said = on_gpu and isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_WORDS)
    return isinstance(error, torch.OutOfMemoryError) or said


def first_line(error: Exception) -> str:
    """What an error of torch or transformers says first."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
