"""The CUDA devices as torch reports them."""

from __future__ import annotations

from .machine import Gpu, Machine, free_memory, has_driver, has_mps


def machine() -> Machine:
    """This machine as torch sees it; raises ImportError without torch."""
    import torch

    if torch.version.cuda is None:
        reason = "this build of torch has no CUDA"
    else:
        reason = "torch found no CUDA device that answers"
    return Machine(free_memory(), cuda_devices(), reason, driver=has_driver(), mps=has_mps())


def cuda_devices() -> list[Gpu]:
    """None where torch is missing or has no CUDA."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), free, total, index=index))
    return found
