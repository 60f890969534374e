"""What a machine has to compute with: free memory and cores, as far as its control groups let this process have them, GPUs."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")


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


def has_driver() -> bool:
    """Whether NVIDIA's driver is installed, whatever the libraries were built for."""
    try:
        ctypes.CDLL("libcuda.so.1")
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
