"""The gptq backend: a GPTQ folder through transformers and gptqmodel on CUDA, elsewhere through llama.cpp.

gptqmodel's kernels for the CPU decode a few tokens a second. The folder's codes and scales fit GGUF without loss, so on
a machine without CUDA they are packed into the cache, once, and run as fast as any GGUF.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gramlite.errors import ModelError, ResourceError
from gramlite.formats.artifact import Artifact, artifact_sha256, read_manifest
from gramlite.runtime.options import RuntimeOptions
from gramlite.storage import cache_folder

from .gguf import backend as gguf
from .protocol import Backend

logger = logging.getLogger("gramlite")

RECIPE = 2  # raise it when packing writes other bytes, so that cached files are made again
EMBEDDING = "f16"  # exact: GPTQ folders hold float16


def open_artifact(artifact: Artifact, options: RuntimeOptions) -> Backend:
    """Open a GPTQ folder on CUDA where torch and gptqmodel can, else as its packed twin.

    Raises ModelError for a folder that is refused or cannot be packed, ResourceError when it does not fit.
    """
    if options.device != "cpu" and not options.adapter:
        reason, level = no_cuda_reason(), logging.INFO
        if reason is None:
            try:
                return open_on_cuda(artifact, options)
            except (ResourceError, ModelError) as error:  # gptqmodel may be there and still not be able to
                if options.device == "cuda":
                    raise
                reason = str(error)
                level = logging.WARNING  # CUDA is there, and still
        logger.log(level, "The GPTQ folder runs packed as GGUF: %s.", reason.rstrip("."))
    backend = gguf.open_artifact(Artifact(packed(artifact.path), "gguf", None), options)
    backend.note = ", packed as GGUF"
    return backend


def no_cuda_reason() -> str | None:
    """Why transformers and gptqmodel cannot be used here, None where they can."""
    for package in ("torch", "transformers", "gptqmodel"):
        if find_spec(package) is None:
            return f"the package {package} is not installed"
    import torch

    if not torch.cuda.is_available():
        return "this build of torch has no CUDA" if torch.version.cuda is None else "no CUDA device answers"
    return None


def open_on_cuda(artifact: Artifact, options: RuntimeOptions) -> Backend:
    """The folder itself, on the GPU with the most free memory; gptqmodel takes its zero points as the label says."""
    import torch

    from gramlite.formats.gptq_folder import open_gptq

    found = open_gptq(artifact.path)
    if found.stored_zero_offset != found.labelled_offset:
        right = "gptq" if found.stored_zero_offset else "gptq_v2"
        raise ModelError(
            f"{artifact.path} has zero points as the checkpoint_format {right!r} stores them, and says another. Correct "
            "it in config.json, or run the folder packed: --device cpu."
        )
    from gramlite.formats.model_folder import read_model_folder
    from gramlite.runtime import torch_devices
    from gramlite.runtime.folder_memory import footprint, stored_bytes
    from gramlite.runtime.placement import Placement, place

    from . import hf

    folder = read_model_folder(artifact.path)
    size = footprint(folder, stored_bytes(artifact.path), 2)
    asked = replace(options, device="cuda")
    placement = place(folder.path.name, folder.context, asked, torch_devices.machine(), cpu=size, gpu=size)

    def load(placement: Placement) -> tuple[Any, Any]:
        return hf.load_model(folder, placement, torch.float16), torch.float16

    def below(placement: Placement, context: int | None) -> Placement | None:
        if options.device == "auto" and not context:  # open_artifact hears it, and packs
            raise ResourceError(f"memory ran out on {placement.device}")
        if options.device == "auto":
            raise ResourceError(
                f"Out of memory on {placement.device}. The folder runs packed on the CPU, too: type --device cpu, "
                "or a smaller --context."
            )
        return None

    bits = (folder.config.get("quantization_config") or {}).get("bits")
    return hf.HfBackend(folder, placement, f"GPTQ {bits}-bit", load=load, below=below)


def packed(folder: Path) -> Path:
    """The folder as a GGUF file in the cache, made when it is first asked for; its name carries the folder's hash.

    Processes that ask at the same time wait for the one that packs. A file that lost its sha256 is packed again.
    Raises ModelError for a folder that GGUF cannot hold, ResourceError where the cache cannot be written.
    """
    from gramlite.console import progress_bar
    from gramlite.formats.gptq_folder import open_gptq
    from gramlite.formats.pack_gguf import pack_gguf
    from gramlite.formats.publish import build_once

    if not folder.is_dir():
        raise ModelError(f"{folder} is no GPTQ folder.")
    open_gptq(folder)  # which refuses it before anything is hashed or said
    destination = twin_path(folder)

    def pack() -> None:
        template = recorded_template(folder)
        pack_gguf(folder, destination, embedding=EMBEDDING, template=template, force=True, progress=progress_bar)

    try:
        return build_once(destination, f"gramlite: packing {folder} for llama.cpp, this once, as {destination}", pack)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be packed in {destination.parent} ({error.strerror}). "
            "Point GRAMLITE_CACHE to a folder that can be written, or type: "
            f"gramlite pack {folder} --to gguf -o judge.gguf"
        ) from error


def recorded_template(folder: Path) -> dict[str, Any] | None:
    """The judge's template that goes into the twin; one that only the model card has is found beside the folder."""
    manifest = read_manifest(folder)
    template = (manifest.template if manifest else None) or {}
    return template if {"name", "sha256", "text"} <= template.keys() else None


def twin_path(folder: Path) -> Path:
    """Where a folder's packed twin lies in the cache, packed or not; figures in its manifest don't move it."""
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name)[:60]
    return cache_folder() / "gptq" / f"{name}-{artifact_sha256(folder, manifest=False)[:16]}-{RECIPE}.gguf"
