"""llama.cpp as a library: started once, what it logged last, and the devices that its build sees."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from pathlib import Path

import llama_cpp

from gramlite.interrupt import uninterrupted
from gramlite.runtime.machine import Gpu, Machine, free_memory, has_driver, has_mps

MEMORY_WORDS = ("out of memory", "failed to allocate", "unable to allocate", "not enough memory")

ERROR = 4  # ggml's level of log lines

_log_tail: deque[str] = deque(maxlen=40)
_errors: list[str] = []  # since the words were forgotten, the first ones
_started = threading.Lock()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, data: object) -> None:
    said = text.decode("utf-8", "replace")
    _log_tail.append(said)
    if level == ERROR and len(_errors) < 20:
        _errors.append(said)


@uninterrupted()
def start_library() -> None:
    """Start llama.cpp, and keep what it logs instead of printing it."""
    with _started:
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()


def forget_words() -> None:
    """Drop what was logged, so that a failure is not explained with an older one."""
    _log_tail.clear()
    _errors.clear()


def first_words() -> str:
    """The first error since the words were forgotten, which is the cause of those that follow it."""
    return next((error.strip() for error in _errors if error.strip()), None) or last_words()


def last_words() -> str:
    """What llama.cpp said last, for an error message."""
    lines = [line.strip() for line in "".join(_log_tail).splitlines() if "rror" in line or "fail" in line]
    return lines[-1] if lines else "no reason given"


def memory_words() -> str | None:
    """The last line that says that memory ran out, None where there is none."""
    lines = [line.strip() for line in "".join(_log_tail).splitlines()]
    return next((line for line in reversed(lines) if any(word in line for word in MEMORY_WORDS)), None)


@uninterrupted()
def machine() -> Machine:
    """This machine as llama.cpp's build sees it."""
    gpus = _gpus() if llama_cpp.llama_supports_gpu_offload() else []
    built = llama_cpp.llama_supports_gpu_offload() and sys.platform != "darwin"
    reason = "llama.cpp found no CUDA device that answers" if built else "this build of llama-cpp-python has no CUDA"
    return Machine(free_memory(), gpus, reason, driver=has_driver(), mps=has_mps())


def _gpus() -> list[Gpu]:
    """The CUDA devices that ggml enumerates, through its own device interface (ggml-backend.h)."""
    ending = "dylib" if sys.platform == "darwin" else "so"
    folder = Path(llama_cpp.__file__).parent / "lib"
    try:
        library, base = (ctypes.CDLL(str(folder / f"lib{name}.{ending}")) for name in ("ggml", "ggml-base"))
    except OSError:
        return []
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    for describe in (base.ggml_backend_dev_name, base.ggml_backend_dev_description):
        describe.restype = ctypes.c_char_p
    found: list[Gpu] = []
    for index in range(library.ggml_backend_dev_count()):
        device = ctypes.c_void_p(library.ggml_backend_dev_get(ctypes.c_size_t(index)))
        if not (base.ggml_backend_dev_name(device) or b"").startswith(b"CUDA"):
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name = (base.ggml_backend_dev_description(device) or b"GPU").decode("utf-8", "replace")
        found.append(Gpu(name, free.value, total.value, index=len(found)))
    return found
