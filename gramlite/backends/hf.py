"""The hf backend: a checkpoint's folder through transformers, full precision or bitsandbytes, on CUDA or the CPU.

Only safetensors are read and no code that comes with a model is run. One sequence at a time: correctness first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ..artifact import Artifact
from ..decoding import Generation, Logits
from ..device import thread_count
from ..errors import InputError, ModelError, OutOfMemory
from ..model_folder import ModelFolder, read_model_folder
from ..one_sequence import PIECE, OneSequence
from ..placement import Footprint, Placement, place, placement_below
from ..stepping_down import Steps
from ..tokenizer_json import read_vocabulary
from . import Request, RuntimeOptions
from .torch_devices import machine

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Load = Callable[[Placement], tuple[Any, Any]]  # the model and its dtype
Below = Callable[[Placement, int | None], Placement | None]

ITEM_BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


class HfBackend:
    """An open checkpoint. Use `open_artifact`."""

    def __init__(
        self, folder: ModelFolder, placement: Placement, quantization: str, *, load: Load, below: Below
    ) -> None:
        self._open = load
        self._model: Any
        self._steps = Steps(placement, load=self._load, free=self._free, below=below)
        self.metadata: Mapping[str, Any] = folder.describe(quantization)
        self.vocabulary = read_vocabulary(folder, int(self._model.get_input_embeddings().num_embeddings))

    def _load(self, placement: Placement) -> None:
        self._model, dtype = self._open(placement)
        self._device = self._model.device
        self._dtype = str(dtype).removeprefix("torch.")
        self._cache: Any = transformers.DynamicCache(config=self._model.config)
        self._sequence = OneSequence(self._compute)

    def _free(self) -> None:
        self._model = self._cache = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def context(self) -> int:
        return self._steps.place.context

    @property
    def device(self) -> str:
        return f"{self._steps.place.device}, {self._dtype}"

    def generate(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Generation]]:
        """See Backend.generate; one after another."""
        return self._steps.generate(requests, lambda coming: self._sequence.generate(coming))

    def _compute(self, tokens: Sequence[int], position: int) -> Logits:
        held = self._cache.get_seq_length()
        if position < held:
            self._cache.crop(position - held)
        ids = torch.tensor([list(tokens)], device=self._device)
        try:
            with torch.inference_mode(), quiet():
                output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        except torch.OutOfMemoryError as error:
            self._cache.crop(-self._cache.get_seq_length())
            raise OutOfMemory(f"at {position + len(tokens):,} tokens, {first_line(error)}") from error
        logits: Logits = output.logits[0, -1].float().cpu().numpy()
        return logits

    def abort(self) -> None:
        self._steps.abort()
        self._sequence.abort()

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
    if options.adapter or options.companion:
        raise InputError("The hf backend takes no --adapter. Merge it: gramlite export merge CHECKPOINT ADAPTER -o OUT")
    if not artifact.path.is_dir():
        raise ModelError(f"{artifact.path} is no checkpoint's folder.")
    folder = read_model_folder(artifact.path)
    sizes = stored_bytes(artifact.path)
    stored = stored_dtype(folder, sizes)
    method = quantization_method(folder)
    found = machine()
    wide = footprint(folder, sizes, torch.float32)
    own = footprint(folder, sizes, stored)
    fits = wide.total(options.context or 1) <= found.free_memory
    size = wide if fits else own
    name, trained = folder.path.name, folder.context
    placement = place(name, trained, options, found, cpu=size, gpu=own)
    torch.set_num_threads(thread_count(options.threads))

    def load(placement: Placement) -> tuple[Any, Any]:
        dtype = stored if placement.gpu or not fits else torch.float32
        return load_model(folder, placement, dtype), dtype

    def below(placement: Placement, context: int | None) -> Placement | None:
        asked = replace(options, context=context or options.context)
        return placement_below(placement, name, trained, asked, machine(), cpu=size)

    quantization = method or next(kind for kind, dtype in DTYPES.items() if dtype == stored)
    return HfBackend(folder, placement, quantization, load=load, below=below)


def stored_bytes(path: Path) -> dict[str, int]:
    """The bytes of a folder's tensors by their type, every file's header checked; ModelError for what is refused."""
    from gramlite.export.checkpoint import read_safetensors_header, weight_files

    sizes: dict[str, int] = {}
    for file in weight_files(path):
        for tensor in read_safetensors_header(file).values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return sizes


def stored_dtype(folder: ModelFolder, sizes: Mapping[str, int]) -> Any:
    """The floating point type that most bytes have; raises ModelError where there is none that is known."""
    known = {dtype: size for dtype, size in sizes.items() if dtype in DTYPES}
    if not known:
        raise ModelError(f"{folder.path} holds no F32, F16 or BF16 tensor, only {', '.join(sizes) or 'nothing'}.")
    return DTYPES[max(known, key=lambda dtype: known[dtype])]


def quantization_method(folder: ModelFolder) -> str | None:
    """NF4, FP4 or INT8 for a bitsandbytes folder, None for full precision; raises ModelError for anything else."""
    settings = folder.config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict) or settings.get("quant_method") != "bitsandbytes":
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ModelError(f"{folder.path} is quantized with {method!r}, which no backend here runs.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{folder.path} needs bitsandbytes. Type: pip install 'gramlite[bnb]'") from error
    return "INT8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "nf4")).upper()


def footprint(folder: ModelFolder, sizes: Mapping[str, int], dtype: Any) -> Footprint:
    """What the model takes with its floating point tensors in `dtype`; quantized bytes stay as they are.

    Computing needs the attention scores and the feed-forward layer of one piece and one row of logits, roughly.
    """
    item = ITEM_BYTES[dtype]
    weights = sum(size // ITEM_BYTES[DTYPES[kind]] * item if kind in DTYPES else size for kind, size in sizes.items())
    heads = folder.count("num_attention_heads")
    head_size = folder.count("head_dim", folder.count("hidden_size") // heads)
    key_values = folder.count("num_key_value_heads", heads) * head_size
    wide = 8 * folder.count("hidden_size") + 4 * folder.count("intermediate_size", 4 * folder.count("hidden_size"))
    compute = PIECE * (wide + heads * min(folder.context, 8192)) * 4 + folder.count("vocab_size") * 8
    return Footprint(weights=weights, token=2 * folder.count("num_hidden_layers") * key_values * item, compute=compute)


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


def load_model(folder: ModelFolder, placement: Placement, dtype: Any) -> Any:
    """The model in evaluation mode, on its device; raises ModelError for what transformers refuses."""
    where = f"cuda:{placement.gpu.index}" if placement.gpu else "cpu"
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
            quantization = getattr(config, "quantization_config", None)
            bitsandbytes = isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes"
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
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
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemory(first_line(error)) from error
        raise ModelError(f"transformers could not load {folder.path}: {first_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):  # transformers would go on with random weights
        if found.get(what):
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found[what])
            raise ModelError(
                f"{folder.path} has {len(names)} {what.replace('_', ' ')}, {names[0]} first. Download it again."
            )
    return model


def first_line(error: Exception) -> str:
    """What an error of torch or transformers says first."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
