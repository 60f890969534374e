"""How an artifact gets to its place: the file and its manifest appear together, whole, the manifest last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gramlite.interrupt import uninterrupted
from gramlite.storage import FOLDER_MANIFEST, atomic_output, fsync_path, json_bytes, remove_path, sha256_file
from gramlite.terminal import note

from .artifact import Manifest, hash_files, is_intact, manifest_path
from .carried import DESCRIBED_FILES, notices_beside

MANIFEST_BYTES = 1 << 20


def publish_file(
    destination: Path, build: Callable[[Path], Manifest], *sources: Path, force: bool, need_bytes: int
) -> Manifest:
    """Let `build` write a file to the path it is given and describe it, then put the file and its manifest in place.

    Licences and notices of the `sources` go beside it. The manifest is on disk before the file is renamed and is renamed
    after it, so that a full disk or a crash leaves the older artifact, or a file whose manifest refuses it, but never a
    manifest that vouches for other bytes.
    """
    with ExitStack() as stack:
        note = stack.enter_context(atomic_output(manifest_path(destination), force=True))
        notices = stack.enter_context(notices_beside(destination, *sources))
        temporary = stack.enter_context(atomic_output(destination, force=force, need_bytes=need_bytes + MANIFEST_BYTES))
        manifest = replace(build(temporary), notices=notices)
        write_durably(note, manifest_text(manifest))
        fsync_path(temporary)  # which may take long, and the renames do not
        with uninterrupted():
            stack.close()
    return manifest


def publish_folder(destination: Path, build: Callable[[Path], Manifest], *, force: bool, need_bytes: int) -> Manifest:
    """Let `build` make a folder at the path it is given and describe it, then put the folder, its manifest inside, in place.

    Where the manifest lists no files, all that are there are hashed.
    """
    with atomic_output(destination, force=force, need_bytes=need_bytes) as folder:
        manifest = build(folder)
        manifest = manifest if manifest.files else replace(manifest, files=hash_files(folder))
        write_durably(folder / FOLDER_MANIFEST, manifest_text(manifest))
    return manifest


def build_once(destination: Path, said: str, build: Callable[[], object]) -> Path:
    """An artifact of one file that the cache keeps, which `build` makes where it is not there or not intact.

    Processes that ask at the same time wait for the one that builds, which says `said`.
    """
    from filelock import FileLock

    if is_intact(destination):
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(destination.with_name(destination.name + ".lock")):
        if not is_intact(destination):
            for leftover in destination.parent.glob(f".{destination.name}.*"):
                remove_path(leftover)  # of a build that was killed: while the lock is held nobody else builds
            remove_path(manifest_path(destination))
            note(said)
            build()
    return destination


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a full disk shows here, before anything is renamed."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def manifest_text(manifest: Manifest) -> str:
    return json_bytes(asdict(manifest)).decode("utf-8")


def unicode_name(name: str) -> str:
    """A file's name as GGUF's metadata can hold it: what is no UTF-8 becomes question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")


def tool_versions(*packages: str) -> dict[str, str]:
    """The installed versions of gramlite and of the packages that took part."""
    versions = {}
    for package in ("gramlite", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_source(folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """What a manifest says of a checkpoint: its name, the sha256 of each file that counts, and one over them all.

    `hashes` has the files that were hashed while they were read, which are the weights, and `bytes` is their size; the
    configuration and the tokenizer are added here.
    """
    files = dict(hashes)
    weights = sum((folder / name).stat().st_size for name in hashes)
    for name in DESCRIBED_FILES:
        if name not in files and (folder / name).is_file():
            files[name] = sha256_file(folder / name)
    listing = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return {
        "name": folder.resolve().name,
        "sha256": hashlib.sha256(listing.encode("utf-8", "backslashreplace")).hexdigest(),
        "files": files,
        "bytes": weights,
    }


def template_record(template: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a manifest says of a judge's template that the file itself holds."""
    return {key: template[key] for key in ("name", "sha256")} if template else None
