"""Where a model runs and with how much context: decided from numbers, before anything is allocated.

`auto` takes CUDA when the build has it, a device answers and at least one layer fits its free memory, with as many
layers as fit; else the CPU. `cuda` never falls back. Every fallback is said, with its reason.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gramlite.errors import InputError, ResourceError
from gramlite.formats.gguf_header import Header, hyperparameters

from .memory import CELL_STEP, ContextSize, block_bytes, largest_context, predict, require_fit
from .options import RuntimeOptions

logger = logging.getLogger("gramlite")

DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 1024
GPU_MARGIN = 0.06  # of a GPU's free memory, left for the driver's own needs
MiB = 1 << 20
CONTROL_GROUPS = Path("/sys/fs/cgroup")
HELD_PROMPTS = 6  # three pairs that wait for more votes, both orders of each
MOST_DRAFTED = 3  # sequences together, beyond which a token guessed right saves no more time than it takes
DRAFT_TOKENS = 8  # the most tokens guessed ahead in a sequence


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that answered, its free and total memory in bytes, and its place among them."""

    name: str
    free: int
    total: int
    index: int = 0


@dataclass(frozen=True)
class Machine:
    """What a decision is made from: free main memory in bytes, GPUs, and why there are none where there are none.

    `driver` says whether NVIDIA's driver is installed, `mps` whether there is an Apple GPU.
    """

    free_memory: int
    gpus: Sequence[Gpu] = ()
    no_gpu_reason: str = "no CUDA device was found"
    driver: bool = False
    mps: bool = False

    @property
    def why_no_gpu(self) -> str:
        """Why nothing runs on a GPU here, in one line; gramlite computes on CUDA and on the CPU alone."""
        reason = self.no_gpu_reason
        if self.driver:
            reason += ", though NVIDIA's driver is installed (gramlite doctor says what to install)"
        return f"{reason}; Apple's GPU (MPS) is not used" if self.mps else reason

    @property
    def freest(self) -> Gpu:
        """The GPU with the most free memory."""
        return max(self.gpus, key=lambda gpu: gpu.free)

    @property
    def choice(self) -> str:
        """Which GPU was taken and why, where there are others."""
        return f", device {self.freest.index}, the freest of {len(self.gpus)}" if len(self.gpus) > 1 else ""

    @property
    def fallback_level(self) -> int:
        """How loudly the CPU is chosen: a machine without any GPU is nothing to warn of."""
        return logging.WARNING if self.gpus or self.driver or self.mps else logging.INFO


@dataclass(frozen=True)
class Layout:
    """How a context computes: `parallel` sequences beside the trunk, all in one cache, in batches of `micro_batch`.

    Flash attention passes over the cells of other sequences. Each sequence asks for its next token's logits, and
    where few run for those behind each token guessed ahead: `outputs` in all.
    """

    parallel: int
    micro_batch: int = 512

    @property
    def sequences(self) -> int:
        """The trunk, what runs, and the prompts that are held for votes to come."""
        return 1 + self.parallel + HELD_PROMPTS

    @property
    def outputs(self) -> int:
        return self.parallel + min(self.parallel, MOST_DRAFTED) * DRAFT_TOKENS + 1


def choose_layout(options: RuntimeOptions) -> Layout:
    """As many sequences together as were asked for; one where the same input must give the same bits."""
    return Layout(1 if options.deterministic else max(1, options.parallel or 1))


@dataclass(frozen=True)
class Offload:
    """A decision: `gpu_layers` of the model's layers on the GPU, `context` tokens, and `device` in words."""

    gpu_layers: int
    context: int
    device: str
    layout: Layout
    main_gpu: int = 0
    reduced: bool = False  # after memory ran out with more layers


def context_size(layout: Layout, context: int) -> ContextSize:
    """What llama.cpp is asked for: the trunk and the sequences, each with logits for its last position."""
    return ContextSize(
        cells=context,
        micro_batch=layout.micro_batch,
        outputs=layout.outputs,
        sequences=layout.sequences,
        flash_attention=True,
    )


def plan_offload(
    header: Header, options: RuntimeOptions, machine: Machine, *, adapters: Sequence[Header] = ()
) -> Offload:
    """Choose the device, the layers and the context for a model.

    Raises ResourceError when it does not fit or `cuda` was demanded and cannot be had, InputError for a context
    beyond what the model was trained for.
    """
    trained = hyperparameters(header).context
    if options.context and options.context > trained:
        raise InputError(
            f"--context {options.context:,} is more than the {trained:,} tokens the model was trained for."
        )
    if options.device == "cpu":
        return _on_cpu(header, options, machine, adapters)
    refusal = machine.why_no_gpu
    if machine.gpus:
        plan = _on_gpu(header, options, machine, adapters)
        if plan:
            return plan
        refusal = f"not one layer fits the {machine.freest.free / MiB:,.0f} MiB free on {machine.freest.name}"
    if options.device == "cuda":
        raise ResourceError(
            f"--device cuda was asked for, but {refusal}. Type --device cpu, a smaller --context, or: gramlite doctor"
        )
    logger.log(machine.fallback_level, "Running on the CPU: %s.", refusal)
    return _on_cpu(header, options, machine, adapters)


def _on_gpu(header: Header, options: RuntimeOptions, machine: Machine, adapters: Sequence[Header]) -> Offload | None:
    """As many layers as the freest GPU holds, None where that is not one.

    Raises ResourceError where main memory does not hold the others.
    """
    gpu = machine.freest
    sizes = hyperparameters(header)
    total = sizes.blocks + 1  # llama.cpp counts the output head as one more layer
    layout = choose_layout(options)
    usable = int(gpu.free * (1 - GPU_MARGIN))

    def split(context: int) -> tuple[int, int]:
        """How many layers fit, and the bytes of main memory that the others take."""
        size = context_size(layout, context)
        layers = layers_that_fit(header, size, usable, adapters=adapters)
        return layers, bytes_beside_gpu(header, size, layers, adapters=adapters)

    wanted = context = options.context or min(DEFAULT_CONTEXT, sizes.context)
    layers, needed = split(context)
    if not layers:
        return None
    if needed > machine.free_memory:
        fitting = (each for each in range(context - CELL_STEP, 0, -CELL_STEP) if split(each)[1] <= machine.free_memory)
        context = next(fitting, 0)
        if options.context or context < LEAST_CONTEXT:
            raise _rest_does_not_fit(header, gpu, (layers, total), (wanted, context), needed, machine.free_memory)
        told = (wanted, needed / MiB, machine.free_memory / MiB, context)
        logger.warning("A context of %d tokens needs %.0f MiB beside the GPU and %.0f are free; using %d.", *told)
        layers, _ = split(context)
    plan = Offload(layers, context, f"cuda ({layers} of {total} layers on {gpu.name})", layout, gpu.index)
    free = f"{gpu.free / MiB:,.0f} MiB free on {gpu.name}{machine.choice}"
    if layers < total:
        logger.warning("%d of %d layers fit the %s; the rest run on the CPU.", layers, total, free)
    else:
        logger.info("Running on %s: it fits the %s.", plan.device, free)
    return plan


def bytes_beside_gpu(header: Header, context: ContextSize, layers: int, *, adapters: Sequence[Header] = ()) -> int:
    """Main memory that a model takes with `layers` of its layers on a GPU, 0 where all of them are there.

    Buffers and adapters may lie in both, and are counted in both.
    """
    blocks, _ = block_bytes(header)
    if layers > len(blocks):
        return 0  # all but the embedding, which is mapped from the file
    needed = predict(header, context, adapters=adapters)
    return needed.total - sum(blocks[len(blocks) - layers :]) - needed.kv_cache * layers // len(blocks)


def _rest_does_not_fit(
    header: Header, gpu: Gpu, layers: tuple[int, int], contexts: tuple[int, int], needed: int, free: int
) -> ResourceError:
    wanted, fitting = contexts
    advice = (
        f"The largest context that fits is {fitting:,}: add --context {fitting}, or free some memory."
        if fitting
        else "No context fits: free some memory, or use a smaller quantization."
    )
    return ResourceError(
        f"{header.path} with a context of {wanted:,} has room for {layers[0]} of {layers[1]} layers on {gpu.name}; the "
        f"rest needs {needed:,} bytes of main memory and {free:,} are free. {advice}"
    )


def offload_below(
    plan: Offload, header: Header, options: RuntimeOptions, machine: Machine, *, adapters: Sequence[Header] = ()
) -> Offload | None:
    """Where a model goes when the GPU's memory ran out under `plan`: to half of its layers there, then to the CPU.

    Half of them are passed over where main memory does not hold the others; on the CPU a smaller context may do.
    None where there is nothing below: on the CPU, or where `cuda` was demanded. Raises ResourceError when main memory
    does not hold it.
    """
    if options.device != "auto" or not plan.gpu_layers:
        return None
    half = plan.gpu_layers // 2
    size = context_size(plan.layout, plan.context)
    more = bytes_beside_gpu(header, size, half, adapters=adapters)
    more -= bytes_beside_gpu(header, size, plan.gpu_layers, adapters=adapters)  # which is there already
    if half and not plan.reduced and more <= machine.free_memory:
        words = plan.device.replace(f"({plan.gpu_layers} of", f"({half} of")
        return replace(plan, gpu_layers=half, device=words, reduced=True)
    return _on_cpu(header, options, machine, adapters)


def layers_that_fit(header: Header, context: ContextSize, free: int, *, adapters: Sequence[Header] = ()) -> int:
    """How many layers fit `free` bytes with their KV cache, beside the compute buffers and the adapters.

    llama.cpp offloads from the last block backwards; with all of them the output head follows, one layer more.
    """
    needed = predict(header, context, adapters=adapters)
    if needed.total <= free:
        return hyperparameters(header).blocks + 1
    blocks, _ = block_bytes(header)
    left = free - needed.compute - sum(tensor.bytes for adapter in adapters for tensor in adapter.tensors)
    layers = 0
    for weights in reversed(blocks):
        left -= weights + needed.kv_cache // len(blocks)
        if left < 0:
            break
        layers += 1
    return layers


def _on_cpu(header: Header, options: RuntimeOptions, machine: Machine, adapters: Sequence[Header]) -> Offload:
    context = options.context or min(DEFAULT_CONTEXT, hyperparameters(header).context)
    layout = choose_layout(options)
    size = context_size(layout, context)
    if options.context is None:
        needed = predict(header, size, adapters=adapters).total
        fitting = largest_context(header, size, free_bytes=machine.free_memory, adapters=adapters)
        if needed > machine.free_memory and fitting >= LEAST_CONTEXT:
            told = (context, needed / MiB, machine.free_memory / MiB, fitting)
            logger.warning("A context of %d tokens needs %.0f MiB and %.0f are free; using %d.", *told)
            return Offload(0, fitting, "cpu", layout)
    require_fit(header, size, free_bytes=machine.free_memory, adapters=adapters)
    return Offload(0, context, "cpu", layout)


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed, whatever the libraries were built for."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def has_mps() -> bool:
    """Whether this is a Mac with Apple's own GPU."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def free_memory() -> int:
    """Main memory in bytes that this process may still take: what the system has, and its control groups' rest."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for group in control_groups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                free = min(free, int((group / limit).read_text()) - int((group / used).read_text()))
            except (OSError, ValueError):  # "max", or the files of the other version
                continue
    return max(free, 0)


def thread_count(asked: int | None) -> int:
    """How many threads to compute with: as asked, else the physical cores that this process may use."""
    if asked:
        return asked
    import psutil

    usable, physical = usable_cores(), psutil.cpu_count(logical=False)
    return max(1, min(usable, physical or usable))


def usable_cores() -> int:
    """The logical cores that this process may use: those of its affinity mask, as far as its control groups' quota goes.

    A quota of one core and a half counts as two: threads share what there is.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (cpu_quota(group) for group in control_groups("cpu"))
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota)]))


def cpu_quota(group: Path) -> float | None:
    """The cores that a control group gives its processes, None where it sets no limit of its own."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in names for word in (group / name).read_text().split())
        except (OSError, ValueError):  # "max", or the files of the other version
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups for `controller` (cpu, memory) and of all above them.

    Version 1 has a tree for each controller, version 2 one for all, and both may be there. In a container the path may be
    the host's, which is not there: the root is the container's own group then.
    https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, inner = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for root in (CONTROL_GROUPS / name for name in ((names, controller) if names else ("", "unified"))):
            group = Path(f"{root}{os.path.normpath(inner)}")
            while group.is_relative_to(root):
                yield group
                group = group.parent
