"""What a quantizer starts from: an exact GGUF, which a checkpoint folder is turned into first."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramlite.export.gguf import export_gguf

from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import Manifest, read_manifest, verify_files
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gguf_header import Header, read_header
from gramlite.judging.template import resolve_template
from gramlite.storage import remove_path, sha256_cached

EXACT = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ExactModel:
    """An exact GGUF to quantize: its file, its checked header, and what the manifest will say of its origin."""

    path: Path
    header: Header
    described: dict[str, Any]
    template: dict[str, Any] | None

    @property
    def matrices(self) -> list[str]:
        """The tensors that are quantized, by name."""
        return [
            tensor.name
            for tensor in self.header.tensors
            if len(tensor.shape) > 1 and tensor.name.endswith("weight") and not tensor.name.endswith("_norm.weight")
        ]

    @property
    def blocks(self) -> int:
        return int(str(self.header.metadata[f"{self.header.architecture}.block_count"]))


@contextmanager
def open_source(source: Path, *, beside: Path, template: str | None = None) -> Iterator[ExactModel]:
    """An exact GGUF as it is, or a checkpoint exported without loss into a temporary folder beside the destination."""
    if not source.is_dir():
        yield _open_file(source, template)
        return
    folder = beside.parent / f".{beside.name}.{uuid.uuid4().hex[:8]}.tmp"
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        exported = folder / f"{beside.stem}.gguf"
        manifest = export_gguf(source, exported, dtype=_exact_dtype(source), template=template)
        yield ExactModel(exported, read_header(exported), manifest.source, manifest.template)
    finally:
        remove_path(folder)


def _open_file(path: Path, template: str | None) -> ExactModel:
    if not path.is_file():
        raise InputError(f"There is no model at {path}. Give a checkpoint's folder or an F16, BF16 or F32 GGUF file.")
    header = read_header(path)
    quantized = [tensor for tensor in header.tensors if tensor.type not in EXACT]
    if quantized:
        raise ModelError(
            f"{path} is quantized already ({quantized[0].name!r} is {quantized[0].type}), and a second rounding adds to "
            "the first. Quantize the checkpoint, or an F16 GGUF of it."
        )
    manifest = read_manifest(path)
    if manifest:
        verify_files(path, manifest)
    described: dict[str, Any] = {
        "name": path.stem,
        "sha256": sha256_cached(path),
        "files": {path.name: sha256_cached(path)},
        "bytes": path.stat().st_size,
    }
    if manifest:
        described["source"] = manifest.source
    return ExactModel(path, header, described, _template_of(header, manifest, template))


def _template_of(header: Header, manifest: Manifest | None, choice: str | None) -> dict[str, Any] | None:
    """The template that goes with the new file; a template inside the GGUF goes along as it is."""
    embedded = {key: header.metadata.get(f"gramlite.template.{key}") for key in ("name", "sha256", "text")}
    recorded = embedded if embedded["text"] else manifest.template if manifest else None
    if choice is None and not recorded:
        return None
    described = resolve_template(choice, recorded, header.path.parent).describe()
    if embedded["text"] and described["sha256"] != embedded["sha256"]:
        raise InputError(
            f"{header.path} carries the template {embedded['name']!r}, which stays in the file. "
            "Quantize the checkpoint's folder to give it another --template, or leave the option out."
        )
    return {key: described[key] for key in ("name", "sha256")} if embedded["text"] else described


def _exact_dtype(folder: Path) -> str:
    """The GGUF dtype that loses nothing of a checkpoint's matrices."""
    stored = {tensor.dtype for tensor in open_checkpoint(folder).tensors.values() if len(tensor.shape) > 1}
    return stored.pop().lower() if len(stored) == 1 and stored <= {"F16", "BF16"} else "f32"
