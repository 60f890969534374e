"""Where a model runs and with how much context: decided from numbers, before anything is allocated.

`auto` takes CUDA when the build has it, a device answers and the model, or at least one layer of one that can be split,
fits its free memory, with as many layers as fit; else the CPU. `cuda` never falls back. Every fallback is said, with
its reason.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gramlite.errors import InputError, ResourceError
from gramlite.formats.gguf_header import Header, hyperparameters

from .gguf_memory import LayeredFootprint, Layout, choose_layout
from .machine import Gpu, Machine
from .memory import Footprint
from .options import RuntimeOptions

logger = logging.getLogger("gramlite")

DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 1024
GPU_MARGIN = 0.06  # of a GPU's free memory, left for the driver's own needs

Memory = Footprint | LayeredFootprint


@dataclass(frozen=True)
class Placement:
    """A decision: the GPU or None for the CPU, and the most tokens a sequence may hold.

    Of a model that can be split `gpu_layers` of its `layers` are on the GPU; `reduced` is one whose memory ran out with
    more of them.
    """

    gpu: Gpu | None
    context: int
    gpu_layers: int = 0
    layers: int = 1
    reduced: bool = False

    @property
    def device(self) -> str:
        """Where it runs, in words."""
        if self.gpu is None:
            return "cpu"
        split = f"{self.gpu_layers} of {self.layers} layers on " if self.layers > 1 else ""
        return f"cuda ({split}{self.gpu.name})"


@dataclass(frozen=True, kw_only=True)
class Offload(Placement):
    """The placement of a GGUF model, and how its context is laid out."""

    layout: Layout

    @property
    def main_gpu(self) -> int:
        return self.gpu.index if self.gpu else 0


P = TypeVar("P", bound=Placement)


def plan_offload(
    header: Header, options: RuntimeOptions, machine: Machine, *, adapters: Sequence[Header] = ()
) -> Offload:
    """Choose the device, the layers and the context for a GGUF model; raises what `place` raises."""
    size = LayeredFootprint(header, choose_layout(options), adapters)
    trained = hyperparameters(header).context
    placement = place(str(header.path), trained, options, machine, cpu=size, gpu=size)
    return Offload(**vars(placement), layout=size.layout)


def offload_below(
    plan: Offload, header: Header, options: RuntimeOptions, machine: Machine, *, adapters: Sequence[Header] = ()
) -> Offload | None:
    """Where a GGUF model goes when the GPU's memory ran out under `plan`; see `placement_below`."""
    size = LayeredFootprint(header, plan.layout, adapters)
    return placement_below(plan, str(header.path), hyperparameters(header).context, options, machine, cpu=size)


def place(
    name: str, trained: int, options: RuntimeOptions, machine: Machine, *, cpu: Memory, gpu: Memory | None
) -> Placement:
    """Choose the device, the layers and the context of the model `name`, trained for `trained` tokens.

    `gpu` is None where the artifact cannot run on CUDA. Raises InputError for a context beyond `trained`,
    ResourceError where it does not fit or `cuda` was demanded and cannot be had.
    """
    if options.context and options.context > trained:
        raise InputError(
            f"--context {options.context:,} is more than the {trained:,} tokens the model was trained for."
        )
    context = options.context or min(DEFAULT_CONTEXT, trained)
    if options.device != "cpu":
        chosen = _on_gpu(name, context, options, machine, gpu)
        if isinstance(chosen, Placement):
            return chosen
        if options.device == "cuda":
            raise ResourceError(
                f"--device cuda was asked for, but {chosen}. Type --device cpu, a smaller --context, or: gramlite doctor"
            )
        logger.log(machine.fallback_level, "Running on the CPU: %s.", chosen)
    return Placement(None, _fit_cpu(name, context, options, machine, cpu), layers=cpu.layers)


def placement_below(
    placement: P, name: str, trained: int, options: RuntimeOptions, machine: Machine, *, cpu: Memory
) -> P | None:
    """Where a model goes when the GPU's memory ran out: to half of its layers there, then to the CPU.

    Half of them are passed over where main memory does not hold the others; on the CPU a smaller context may do.
    None where there is nothing below: on the CPU, or where `cuda` was demanded. Raises ResourceError when main memory
    does not hold it.
    """
    if options.device != "auto" or placement.gpu is None:
        return None
    half, context = placement.gpu_layers // 2, placement.context
    if half and not placement.reduced:
        there = cpu.beside_gpu(placement.gpu_layers, context)  # already
        if cpu.beside_gpu(half, context) - there <= machine.free_memory:
            return replace(placement, gpu_layers=half, reduced=True)
    context = _fit_cpu(name, options.context or min(DEFAULT_CONTEXT, trained), options, machine, cpu)
    return replace(placement, gpu=None, gpu_layers=0, context=context, reduced=False)


def _on_gpu(
    name: str, wanted: int, options: RuntimeOptions, machine: Machine, memory: Memory | None
) -> Placement | str:
    """As much of a model as the GPU with the most free memory holds, or why it is nothing.

    Raises ResourceError where main memory does not hold the rest.
    """
    if not machine.gpus:
        return machine.why_no_gpu
    if memory is None:
        return "this artifact was made for the CPU"
    gpu, free = machine.freest, machine.free_memory
    usable = int(gpu.free * (1 - GPU_MARGIN))

    def split(context: int) -> tuple[int, int]:
        """How many layers fit, and the bytes of main memory that the others take."""
        layers = memory.layers_in(usable, context)
        return layers, memory.beside_gpu(layers, context)

    context = wanted
    layers, needed = split(context)
    if not layers and memory.layers > 1:
        return f"not one layer fits the {_show(gpu.free, memory)} free on {gpu.name}"
    if not layers:
        return f"{_show(needed, memory)} are needed and {_show(usable, memory)} are free on {gpu.name}"
    if needed > free:
        shorter = range(context - memory.step, 0, -memory.step)
        context = next((each for each in shorter if split(each)[1] <= free), 0)
        if options.context or context < LEAST_CONTEXT:
            raise ResourceError(
                f"{name} with a context of {wanted:,} has room for {layers} of {memory.layers} layers on {gpu.name}; the "
                f"rest needs {needed:,} bytes of main memory and {free:,} are free. {_advice(context)}"
            )
        _use_shorter(wanted, needed, free, context, memory, where=" beside the GPU")
        layers, _ = split(context)
    placement = Placement(gpu, context, layers, memory.layers)
    room = f"{_show(gpu.free, memory)} free on {gpu.name}{machine.choice}"
    if layers < memory.layers:
        logger.warning("%d of %d layers fit the %s; the rest run on the CPU.", layers, memory.layers, room)
    else:
        logger.info("Running on %s: it fits the %s.", placement.device, room)
    return placement


def _fit_cpu(name: str, context: int, options: RuntimeOptions, machine: Machine, memory: Memory) -> int:
    """The context as it was wanted, or where none was asked for the largest that main memory holds."""
    needed, free = memory.at(context), machine.free_memory
    if needed.total <= free:
        return context
    fitting = largest_context(memory, context, free)
    if options.context is None and fitting >= LEAST_CONTEXT:
        _use_shorter(context, needed.total, free, fitting, memory)
        return fitting
    parts = (needed.weights, needed.kv_cache, needed.compute)
    weights, kv_cache, compute = (f"{part / 1e6:,.0f} MB" for part in parts)
    raise ResourceError(
        f"{name} with a context of {context:,} needs {needed.total:,} bytes (weights {weights}, KV cache {kv_cache}, "
        f"compute {compute}) and {free:,} are free. {_advice(fitting)}"
    )


def _use_shorter(wanted: int, needed: int, free: int, context: int, memory: Memory, where: str = "") -> None:
    unit, size = memory.unit
    told = (wanted, needed / size, unit, where, free / size, context)
    logger.warning("A context of %d tokens needs %.0f %s%s and %.0f are free; using %d.", *told)


def largest_context(memory: Memory, most: int, free: int) -> int:
    """The most tokens, `most` at most, that fit in `free` bytes; 0 where there are none."""
    contexts = range(memory.step, most + 1, memory.step)
    return memory.step * bisect_right(contexts, free, key=lambda context: memory.at(context).total)


def _show(size: int, memory: Memory) -> str:
    unit, each = memory.unit
    return f"{size / each:,.0f} {unit}"


def _advice(fitting: int) -> str:
    if not fitting:
        return "No context fits: free some memory, or use a smaller quantization."
    return f"The largest context that fits is {fitting:,}: add --context {fitting}, or free some memory."
