"""Where a model runs and with how much context: decided from numbers, before anything is allocated.

`auto` takes CUDA when the build has it, a device answers and at least one layer fits its free memory, with as many
layers as fit; else the CPU. `cuda` never falls back. Every fallback is said, with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .backends import RuntimeOptions
from .errors import InputError, ResourceError
from .gguf_header import Header, hyperparameters
from .memory import Prediction, largest_context, predict

logger = logging.getLogger("gramlite")

DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 1024
GPU_MARGIN = 0.06  # of a GPU's free memory, left for the driver's own needs
MiB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that answered, its free and total memory in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class Machine:
    """What a decision is made from: free main memory in bytes, GPUs, and why there are none where there are none."""

    free_memory: int
    gpus: Sequence[Gpu] = ()
    no_gpu_reason: str = "no CUDA device was found"


@dataclass(frozen=True)
class Offload:
    """A decision: `gpu_layers` of the model's layers on the GPU, `context` tokens, and `device` in words."""

    gpu_layers: int
    context: int
    device: str
    prediction: Prediction


def plan_offload(header: Header, options: RuntimeOptions, machine: Machine) -> Offload:
    """Choose the device, the layers and the context for a model.

    Raises ResourceError when it does not fit or `cuda` was demanded and cannot be had, InputError for a context
    beyond what the model was trained for.
    """
    sizes = hyperparameters(header)
    if options.context and options.context > sizes.context:
        raise InputError(f"--context {options.context:,} is more than the {sizes.context:,} tokens the model was trained for.")
    if options.device == "cpu":
        return _on_cpu(header, options, machine)
    if not machine.gpus:
        if options.device == "cuda":
            raise ResourceError(f"--device cuda was asked for, but {machine.no_gpu_reason}. Type --device cpu, or see: gramlite doctor")
        logger.info("Running on the CPU: %s.", machine.no_gpu_reason)
        return _on_cpu(header, options, machine)
    gpu = max(machine.gpus, key=lambda device: device.free)
    context = options.context or min(DEFAULT_CONTEXT, sizes.context)
    layers = layers_that_fit(header, context, int(gpu.free * (1 - GPU_MARGIN)))
    total = sizes.blocks + 1  # llama.cpp counts the output head as one more layer
    if layers == 0:
        what = f"not one layer fits the {gpu.free / MiB:,.0f} MiB free on {gpu.name}"
        if options.device == "cuda":
            raise ResourceError(f"--device cuda was asked for, but {what}. Free some memory, or try a smaller --context.")
        logger.warning("Running on the CPU: %s.", what)
        return _on_cpu(header, options, machine)
    if layers < total:
        logger.warning("%d of %d layers fit the %.0f MiB free on %s; the rest run on the CPU.", layers, total, gpu.free / MiB, gpu.name)
    return Offload(layers, context, f"cuda ({layers} of {total} layers on {gpu.name})", predict(header, context))


def layers_that_fit(header: Header, context: int, free: int) -> int:
    """How many layers' weights and KV cache fit `free` bytes beside the compute buffers; all of them and the head is one more."""
    sizes = hyperparameters(header)
    whole = predict(header, context)
    if whole.total <= free:
        return sizes.blocks + 1
    per_layer = whole.layer_weights + whole.kv_cache // sizes.blocks
    return max(0, min(sizes.blocks, (free - whole.compute) // per_layer))


def _on_cpu(header: Header, options: RuntimeOptions, machine: Machine) -> Offload:
    sizes = hyperparameters(header)
    context = options.context or min(DEFAULT_CONTEXT, sizes.context)
    needed = predict(header, context)
    if needed.total <= machine.free_memory:
        return Offload(0, context, "cpu", needed)
    fitting = largest_context(header, machine.free_memory)
    shortage = (
        f"The model needs {needed.total / MiB:,.0f} MiB with a context of {context:,} tokens (weights {needed.weights / MiB:,.0f}, "
        f"KV cache {needed.kv_cache / MiB:,.0f}, compute {needed.compute / MiB:,.0f}) and {machine.free_memory / MiB:,.0f} MiB are free."
    )
    if options.context is None and fitting >= LEAST_CONTEXT:
        logger.warning("%s Using a context of %s tokens.", shortage, f"{fitting:,}")
        return Offload(0, fitting, "cpu", predict(header, fitting))
    advice = f"The largest --context that fits is {fitting:,}." if fitting > 0 else "Use a smaller quantization."
    raise ResourceError(f"{shortage} {advice}")


def free_memory() -> int:
    """Main memory in bytes that this process may still take: what the system has, and its control group's rest."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # "max", or no control groups
            continue
    return max(free, 0)


def thread_count(asked: int | None) -> int:
    """How many threads to compute with: as asked, else the physical cores that this process may use."""
    if asked:
        return asked
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))
