"""The names that backends take from here, which have places of their own: machine, placement and gguf_memory."""

from .gguf_memory import DRAFT_TOKENS, MOST_DRAFTED
from .machine import Gpu, Machine, free_memory, has_driver, has_mps, thread_count, usable_cores
from .placement import GPU_MARGIN, Offload, offload_below, plan_offload

__all__ = [
    "DRAFT_TOKENS",
    "GPU_MARGIN",
    "MOST_DRAFTED",
    "Gpu",
    "Machine",
    "Offload",
    "free_memory",
    "has_driver",
    "has_mps",
    "offload_below",
    "plan_offload",
    "thread_count",
    "usable_cores",
]
