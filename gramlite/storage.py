"""Files and folders that appear whole or not at all, and where gramlite keeps its own state."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import GramliteError, InputError, ResourceError
from .interrupt import unfinished, uninterrupted

CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """The folder for gramlite's own state: GRAMLITE_CACHE, else the platform's cache folder."""
    override = os.environ.get("GRAMLITE_CACHE")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_cache_dir("gramlite", appauthor=False))


def check_output(destination: Path, sources: Iterable[Path], *, force: bool = False, file: bool = False) -> None:
    """Refuse an output before any work is done for it; `file` says that it is to be a file and not a folder.

    Raises InputError where it lies in one of its `sources` or one of them in it, where it exists and `force` is not
    set, and, even with `force`, for what no command of gramlite would have written there: a folder with other things.
    A GGUF file may lie beside the weights it is made of, in their folder.
    """
    destination = Path(destination)
    for source in map(Path, sources):
        if file and source.is_dir() and (destination.suffix == ".gguf" or not destination.exists()):
            continue
        if lies_in(destination, source) or lies_in(source, destination):
            raise InputError(f"{destination} and its source {source} lie in one another. Choose another -o.")
    if file and destination.is_dir():
        raise InputError(f"{destination} is a folder. Name the file to write: -o {destination / 'model.gguf'}")
    if not force and destination.exists():
        raise InputError(f"{destination} already exists. Choose another -o, or add --force to replace it.")
    if file:
        return
    if destination.is_symlink() or destination.is_file():
        raise InputError(f"{destination} is no folder, so --force will not replace it. Choose another -o.")
    if destination.is_dir() and any(destination.iterdir()) and not is_model_folder(destination):
        raise InputError(
            f"{destination} is no checkpoint and no artifact, so --force will not replace it. Choose another -o."
        )


def lies_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another one or lies in it, links and a file system without cases seen through."""
    if not outer.exists():
        return False
    inner = inner.resolve()
    return any(place.exists() and place.samefile(outer) for place in (inner, *inner.parents))


def is_model_folder(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "gramlite.json"))


@contextmanager
def atomic_output(destination: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `destination`; on success fsync it and rename it into place.

    The caller makes a file or a folder at the yielded path. Until the body returns nothing is seen at
    `destination`; if the body raises, the temporary path is removed and an older artifact stays untouched.
    `need_bytes` is checked against the disk's free space first.

    Raises InputError when `destination` exists and `force` is false, ResourceError when the disk is full.
    """
    destination = Path(destination)
    if not force and destination.exists():
        raise InputError(f"{destination} already exists. Choose another -o, or add --force to replace it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(destination.parent, need_bytes)
    temporary = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp"
    unfinished.add(temporary)
    try:
        yield temporary
        fsync_tree(temporary)
        replace_path(temporary, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"The disk of {destination.parent} is full; {destination.name} was not written. "
                "Free some space, or choose another -o."
            ) from error
        raise
    finally:
        remove_path(temporary)
        unfinished.discard(temporary)


@uninterrupted()
def replace_path(source: Path, destination: Path) -> None:
    """Rename `source` over `destination`, a folder too, and make the rename durable."""
    if destination.is_dir() and not destination.is_symlink():
        old = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(destination, old)
        try:
            os.rename(source, destination)
        except OSError:
            os.rename(old, destination)
            raise
        remove_path(old)
    else:
        os.replace(source, destination)
    fsync_path(destination.parent)


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """fsync a file, or every file of a folder and then the folder."""
    if path.is_dir():
        for child in sorted(path.iterdir()):
            fsync_tree(child)
    fsync_path(path)


def remove_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_free_space(folder: Path, need_bytes: int) -> None:
    """Raise ResourceError unless `folder`'s disk has `need_bytes` free."""
    if need_bytes <= 0:
        return
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ResourceError(
            f"{folder} has {free / 1e6:,.0f} MB free and {need_bytes / 1e6:,.0f} MB are needed. "
            "Free some space, or choose another -o."
        )


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically, replacing what is there."""
    with atomic_output(path, force=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise GramliteError(f"{path} could not be read: {error.strerror}.") from error
    return digest.hexdigest()


def sha256_cached(path: Path) -> str:
    """The sha256 of a file, remembered in the cache folder by size, modification time and inode."""
    identity = file_identity(path)
    known = remembered_sha256(identity)
    if known is None:
        known = sha256_file(path)
        remember_sha256(identity, known)
    return known


def file_identity(path: Path) -> str:
    """What a file's remembered sha256 is kept under: place, size, modification time and inode."""
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def remembered_sha256(identity: str) -> str | None:
    """The sha256 that was remembered for a file's identity, if any."""
    try:
        known = sha256_note(identity).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return known if len(known) == 64 else None


def remember_sha256(identity: str, digest: str) -> None:
    """Keep a sha256 for later; `identity` is the file's from before it was read."""
    note = sha256_note(identity)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(note, force=True) as temporary:
            temporary.write_text(digest, encoding="ascii")
    except (OSError, GramliteError):
        pass  # a read-only cache costs time, not correctness


def sha256_note(identity: str) -> Path:
    return cache_folder() / "sha256" / hashlib.sha256(identity.encode()).hexdigest()[:32]
