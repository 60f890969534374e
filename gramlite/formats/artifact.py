"""Artifacts: a model file or folder, its format, and the manifest `gramlite.json` that says where it came from.

A manifest lies inside a folder artifact as `gramlite.json` and beside a one-file artifact as `<file>.json`.
A bare file or folder from elsewhere has no manifest, and works.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from gramlite.errors import ModelError
from gramlite.storage import FOLDER_MANIFEST, sha256_cached, sha256_file, target_of, write_json

from .model_folder import read_json_object

MANIFEST_VERSION = 1
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is recorded of an artifact.

    `format` is a backend's file name (gguf, onnx, gptq, hf); `quantization` is spelled as llama.cpp spells it
    where it has a name for it; `source` names the checkpoint and its sha256; `settings` are the method's own
    options; `calibration` says what data calibrated it, with its hash; `tools` maps package to version;
    `template` holds `name`, `sha256` and, where the artifact cannot hold it itself, `text`; `files` maps each
    relative path to its sha256; `notices` does so for the licences and notices beside a one-file artifact, which are
    not checked; `smoke` holds the figures of the smoke judging.
    """

    format: str
    name: str
    quantization: str | None = None
    method: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    tools: dict[str, str] = field(default_factory=dict)
    template: dict[str, Any] | None = None
    bits_per_weight: float | None = None
    files: dict[str, str] = field(default_factory=dict)
    notices: dict[str, str] = field(default_factory=dict)
    smoke: dict[str, Any] | None = None
    manifest_version: int = MANIFEST_VERSION


@dataclass(frozen=True)
class Artifact:
    """A model on disk: `path` is the file or the folder, `format` the name of the backend that runs it."""

    path: Path
    format: str
    manifest: Manifest | None

    @property
    def name(self) -> str:
        return self.manifest.name if self.manifest else self.path.stem if self.path.is_file() else self.path.name


def manifest_path(artifact_path: Path) -> Path:
    """Where the manifest of a file or folder artifact lies; of a link, beside its target unless one is beside itself."""
    if artifact_path.is_dir():
        return artifact_path / FOLDER_MANIFEST
    beside = artifact_path.with_name(artifact_path.name + ".json")
    target = target_of(artifact_path)
    return beside if beside.exists() else target.with_name(target.name + ".json")


def write_manifest(artifact_path: Path, manifest: Manifest) -> None:
    """Write the manifest of an artifact that is already in place (the manifest always comes last)."""
    write_json(manifest_path(artifact_path), asdict(manifest))


def read_manifest(artifact_path: Path) -> Manifest | None:
    """Read an artifact's manifest, or None where it has none.

    Raises ModelError when the file is there and is not a manifest.
    """
    path = manifest_path(artifact_path)
    if not os.path.lexists(path):
        return None
    raw = read_json_object(path, advice="Remove it to use the bare model.", finite=True)
    kinds = get_type_hints(Manifest)
    for name in ("format", "name", *kinds):
        if not fits(raw.get(name), kinds[name]) and (name in raw or name in ("format", "name")):
            raise ModelError(
                f"{path} is no gramlite manifest: {name!r} is {ascii(raw.get(name)):.80}. Remove it to use the bare model."
            )
    if raw.get("companion"):
        raise companion_refusal(artifact_path, raw["companion"])
    return Manifest(**{key: value for key, value in raw.items() if key in kinds})


def fits(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type as `Manifest` writes them; a number has to be finite."""
    arguments = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(fits(value, each) for each in arguments)
    if arguments:
        return isinstance(value, dict) and (arguments[1] is Any or all(fits(each, str) for each in value.values()))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6
    return type(value) is kind


def companion_refusal(artifact_path: Path, companion: object) -> ModelError:
    """The refusal of a file that version 0.1 wrote with --low-rank: without its adapter it would judge wrongly."""
    return ModelError(
        f"{artifact_path} is only right together with the adapter {ascii(companion):.80}, its companion, and companions "
        "are no longer run. Quantize the source again: gramlite quantize gguf SOURCE -o OUT --type Q4_K_M"
    )


def hash_files(artifact_path: Path) -> dict[str, str]:
    """sha256 of every file of an artifact, by its path relative to the artifact (a file maps its own name)."""
    if artifact_path.is_file():
        return {artifact_path.name: sha256_file(artifact_path)}
    return {str(path.relative_to(artifact_path)): sha256_file(path) for path in _files(artifact_path)}


def artifact_bytes(artifact_path: Path) -> int:
    """The size of an artifact, its manifest not included."""
    return sum(path.stat().st_size for path in _files(artifact_path))


def _files(artifact_path: Path) -> list[Path]:
    """The file itself, or a folder's files in order, its manifest not included."""
    if artifact_path.is_file():
        return [artifact_path]
    return [path for path in sorted(artifact_path.rglob("*")) if path.is_file() and path.name != FOLDER_MANIFEST]


def verify_files(artifact_path: Path, manifest: Manifest) -> None:
    """Check every file that the manifest lists; raises ModelError that names the first one that differs."""
    root = manifest_path(artifact_path).parent
    for relative, expected in manifest.files.items():
        path = root / relative
        try:
            inside, there = path.resolve().is_relative_to(root.resolve()), path.is_file()
        except (OSError, ValueError, RuntimeError):  # a name too long, with a NUL in it, a link to itself
            inside = False
        if not inside:
            raise ModelError(
                f"The manifest of {artifact_path} lists {ascii(relative):.80}, which lies outside of it. "
                f"Export or download it again, or remove {manifest_path(artifact_path)}."
            )
        if not there:
            raise ModelError(f"{path} is listed in the manifest and is missing. Export or download it again.")
        if sha256_cached(path) != expected:
            raise ModelError(
                f"{path} does not have the sha256 its manifest lists. Export or download it again, "
                f"or delete {manifest_path(artifact_path)} if you changed the file on purpose."
            )


def is_intact(path: Path) -> bool:
    """Whether a single-file artifact is there whole, by the sha256 in its manifest."""
    if not path.is_file() or not manifest_path(path).is_file():
        return False
    try:
        manifest = read_manifest(path)
        if manifest is None or path.name not in manifest.files:
            return False
        verify_files(path, manifest)
    except ModelError:
        return False
    return True


def artifact_sha256(path: Path, *, manifest: bool = True) -> str:
    """A file's sha256; of a folder, the sha256 of its files' names and hashes.

    Without `manifest` only the template counts of what the folder's gramlite.json says.
    """
    if path.is_file():
        return sha256_cached(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    if not manifest:
        files = [file for file in files if file != manifest_path(path)]
    listing = [[str(file.relative_to(path)), sha256_cached(file)] for file in files]
    if not manifest:
        recorded = read_manifest(path)
        listing.append(["template", str(((recorded.template if recorded else None) or {}).get("sha256"))])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
