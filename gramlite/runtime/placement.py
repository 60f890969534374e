"""Where a model that runs as a whole goes: CUDA when it fits there, else the CPU, decided from numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gramlite.errors import InputError, ResourceError

from .device import DEFAULT_CONTEXT, GPU_MARGIN, LEAST_CONTEXT, Gpu, Machine
from .options import RuntimeOptions

logger = logging.getLogger("gramlite")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a model takes on one device: its weights, a token of its KV cache, and what computing needs besides."""

    weights: int
    token: int
    compute: int

    def total(self, context: int) -> int:
        return self.weights + self.token * context + self.compute


@dataclass(frozen=True)
class Placement:
    """A decision: the GPU or None for the CPU, and the most tokens a sequence may hold."""

    gpu: Gpu | None
    context: int

    @property
    def device(self) -> str:
        return f"cuda ({self.gpu.name})" if self.gpu else "cpu"


def place(
    name: str, trained: int, options: RuntimeOptions, machine: Machine, *, cpu: Footprint, gpu: Footprint | None
) -> Placement:
    """Choose the device and the context of the model `name`, trained for `trained` tokens.

    `gpu` is None where the artifact cannot run on CUDA. Raises InputError for a context beyond `trained`,
    ResourceError where it does not fit or `cuda` was demanded and cannot be had.
    """
    if options.context and options.context > trained:
        raise InputError(
            f"--context {options.context:,} is more than the {trained:,} tokens the model was trained for."
        )
    context = options.context or min(DEFAULT_CONTEXT, trained)
    if options.device != "cpu":
        chosen, refusal = _choose_gpu(machine, gpu, context)
        if chosen:
            placement = Placement(chosen, context)
            free = f"{chosen.free / 1e6:,.0f} MB free on {chosen.name}{machine.choice}"
            logger.info("Running on %s: it fits the %s.", placement.device, free)
            return placement
        if options.device == "cuda":
            raise ResourceError(
                f"--device cuda was asked for, but {refusal}. Type --device cpu, a smaller --context, or: gramlite doctor"
            )
        logger.log(machine.fallback_level, "Running on the CPU: %s.", refusal)
    return Placement(None, _fit_cpu(name, context, options, machine, cpu))


def placement_below(
    placement: Placement, name: str, trained: int, options: RuntimeOptions, machine: Machine, *, cpu: Footprint
) -> Placement | None:
    """The CPU for a model whose GPU's memory ran out; None where it is there already or `cuda` was demanded.

    Raises ResourceError when main memory does not hold it.
    """
    if options.device != "auto" or placement.gpu is None:
        return None
    context = options.context or min(DEFAULT_CONTEXT, trained)
    return Placement(None, _fit_cpu(name, context, options, machine, cpu))


def _choose_gpu(machine: Machine, footprint: Footprint | None, context: int) -> tuple[Gpu | None, str]:
    """The GPU with the most free memory where the model fits it; else why not."""
    if not machine.gpus:
        return None, machine.why_no_gpu
    if footprint is None:
        return None, "this artifact was made for the CPU"
    best = machine.freest
    needed, usable = footprint.total(context), int(best.free * (1 - GPU_MARGIN))
    if needed > usable:
        return None, f"{needed / 1e6:,.0f} MB are needed and {usable / 1e6:,.0f} MB are free on {best.name}"
    return best, ""


def _fit_cpu(name: str, context: int, options: RuntimeOptions, machine: Machine, cpu: Footprint) -> int:
    needed, free = cpu.total(context), machine.free_memory
    if needed <= free:
        return context
    fitting = max(0, (free - cpu.weights - cpu.compute) // cpu.token)
    if options.context is None and fitting >= LEAST_CONTEXT:
        told = (context, needed / 1e6, free / 1e6, fitting)
        logger.warning("A context of %d tokens needs %.0f MB and %.0f are free; using %d.", *told)
        return fitting
    advice = (
        f"The largest context that fits is {fitting:,}: add --context {fitting}, or free some memory."
        if fitting
        else "No context fits: free some memory, or use a smaller quantization."
    )
    raise ResourceError(f"{name} with a context of {context:,} needs {needed:,} bytes and {free:,} are free. {advice}")
