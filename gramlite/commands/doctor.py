"""`gramlite doctor`: what works on this machine, and for what does not, why and what to type."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import click

from gramlite.terminal import say_json

if TYPE_CHECKING:
    from gramlite.runtime.machine import Machine

MiB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it works, and what there is to say of it."""

    name: str
    works: bool
    says: str


def version_of(package: str) -> str | None:
    """An installed package's version, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_machine() -> Finding:
    from gramlite.runtime.machine import free_memory, thread_count

    says = (
        f"{platform.system()} {platform.machine()}, {thread_count(None)} threads, {free_memory() / MiB:,.0f} MiB free"
    )
    return Finding("machine", True, f"Python {platform.python_version()}, {says}")


def check_llama_cpp() -> Finding:
    version = version_of("llama-cpp-python")
    if version is None:
        return Finding("gguf backend", False, "llama-cpp-python is not installed. Type: pip install llama-cpp-python")
    try:
        import llama_cpp  # noqa: TID253, F401
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("gguf backend", False, f"llama-cpp-python {version} does not load: {error}")
    return Finding("gguf backend", True, f"llama-cpp-python {version}")


def check_runtime(name: str, packages: Sequence[str], extra: str, module: str, install: str) -> Finding:
    """Whether what runs a format has CUDA; `module` has the function that sees this machine as it does."""
    version = next((found for found in map(version_of, packages) if found), None)
    if packages and version is None:
        return Finding(name, False, f"{packages[-1]} is not installed. Type: pip install 'gramlite[{extra}]'")
    lead = f"{packages[-1]} {version}, " if packages else ""
    return check_cuda(name, lambda: importlib.import_module(module).machine(), install, lead)


def check_cuda(name: str, machine: Callable[[], Machine], install: str, lead: str = "") -> Finding:
    """Whether a runtime has CUDA and which GPU judging takes, and where not, why and what to type."""
    try:
        found = machine()
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name, False, f"{lead}which does not load: {error}")
    if not found.gpus:
        says = f"{lead}{replace(found, driver=False).why_no_gpu}; judging runs on the CPU. "
        if found.driver:
            return Finding(name, False, f"{says}NVIDIA's driver is installed, so type: {install}")
        return Finding(
            name, False, f"{says}NVIDIA's driver is not installed. With an NVIDIA GPU and it, type: {install}"
        )
    gpus = ", ".join(
        f"GPU {gpu.index} {gpu.name} ({gpu.free / MiB:,.0f} of {gpu.total / MiB:,.0f} MiB free)" for gpu in found.gpus
    )
    most = ", which has the most free memory" if len(found.gpus) > 1 else ""
    where = f"judging runs on GPU {found.freest.index}{most}, where a model fits it"
    return Finding(name, True, f"{lead}{gpus}; {where}")


CUDA_INSTALL = "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python==0.3.36"
TORCH_INSTALL = "pip install --force-reinstall torch, with the index that pytorch.org names for your CUDA"
ONNX_INSTALL = "pip uninstall -y onnxruntime onnxruntime-genai && pip install 'gramlite[onnx-cuda]'"
RUNTIMES = (  # that judge on CUDA: a name, packages whose version is told, their extra, a module, what to type
    ("CUDA for gguf (llama.cpp)", (), "", "gramlite.backends.gguf.library", CUDA_INSTALL),
    ("CUDA for hf and gptq (torch)", ("torch",), "hf", "gramlite.runtime.torch_devices", TORCH_INSTALL),
    ("CUDA for onnx (onnxruntime)", ("onnxruntime-gpu", "onnxruntime"), "onnx", "gramlite.backends.onnx", ONNX_INSTALL),
)


def check_reference() -> Finding:
    from gramlite.errors import GramliteError
    from gramlite.reference.files import base_path

    try:
        return Finding("reference judge", True, f"its base weights are {base_path()}")
    except GramliteError as error:
        return Finding("reference judge", False, str(error))


def check_cache() -> Finding:
    import tempfile

    from gramlite.errors import ResourceError
    from gramlite.storage import cache_folder

    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-"):
            pass
    except ResourceError as error:
        return Finding("cache folder", False, str(error))
    except OSError as error:
        return Finding("cache folder", False, f"{folder} cannot be written ({error.strerror}). Set GRAMLITE_CACHE.")
    return Finding("cache folder", True, str(folder))


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_machine,
    check_llama_cpp,
    *(partial(check_runtime, *runtime) for runtime in RUNTIMES),
    check_reference,
    check_cache,
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal.")
def command(as_json: bool) -> None:
    """Say what works on this machine: versions, backends, devices, and why something does not work."""
    findings = [Finding("gramlite", True, version_of("gramlite") or "not installed"), *(check() for check in CHECKS)]
    if as_json or not sys.stdout.isatty():
        for finding in findings:
            say_json(asdict(finding))
        return
    from rich.text import Text

    from gramlite.console import show_facts

    marks = {True: ("yes", "green"), False: ("no", "yellow")}
    show_facts([(Text(*marks[finding.works]), finding.name, finding.says) for finding in findings])
