"""Files and folders that appear whole or not at all, and where gramlite keeps its own state."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .errors import GramliteError, InputError, ResourceError
from .interrupt import temporary_paths, uninterrupted

Inputs = Iterable[Path | str | None]  # files, and names that may be files, like a template's

FOLDER_MANIFEST = "gramlite.json"
MANIFEST_MARK = '"manifest_version"'
LARGEST_NOTE = 16 << 20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_folder() -> Path:
    """The folder for gramlite's own state: GRAMLITE_CACHE, else the platform's cache folder.

    Raises ResourceError where there is neither, as for a user without a home folder.
    """
    override = os.environ.get("GRAMLITE_CACHE")
    if override:
        return Path(override)
    import platformdirs

    try:
        folder = Path(platformdirs.user_cache_dir("gramlite", appauthor=False))
    except RuntimeError:
        folder = Path("~")
    if not folder.is_absolute():  # as older versions of platformdirs leave it
        raise ResourceError("There is no home folder for gramlite's cache. Set GRAMLITE_CACHE to a folder of your own.")
    return folder


# --- what an output may be ------------------------------------------------------------------------------------


def check_output(
    destination: Path, sources: Iterable[Path], *, force: bool = False, file: bool = False, inputs: Inputs = ()
) -> Path:
    """Refuse an output before any work is done for it; return where it is written, which for a link is its target.

    `file` says that it is to be a file and not a folder. Raises InputError where it lies in one of its `sources` or one
    of them in it, or is one of the `inputs` that are read besides, where it exists and `force` is not set, and, even
    with `force`, for what no command of gramlite would have written there: a folder with other things, a device, a
    pipe. A GGUF file may lie beside the weights it is made of, in their folder.
    """
    named, destination = Path(destination), target_of(Path(destination))
    for source in map(Path, sources):
        if file and source.is_dir() and (destination.suffix == ".gguf" or not destination.exists()):
            continue
        if lies_in(destination, source) or lies_in(source, destination):
            raise InputError(f"{named} and its source {source} lie in one another. Choose another -o.")
    if file:
        check_file(named, inputs)
        note = destination.with_name(f"{destination.name}.json")
        check_note(note, inputs, MANIFEST_MARK)
        beside = named.with_name(f"{named.name}.json")
        if named != destination and beside.exists() and not lies_in(beside, note):
            raise InputError(f"{named} is a link, and {beside} would not fit any more. Give -o {destination} instead.")
    elif destination.exists() and not destination.is_dir():
        raise InputError(f"{named} is no folder, so --force will not replace it. Choose another -o.")
    elif any(lies_in(Path(each), destination) for each in inputs if each):
        raise InputError(f"{named} holds what this command reads. Choose another -o.")
    if not force and destination.exists():
        raise InputError(f"{named} already exists. Choose another -o, or add --force to replace it.")
    if not file:
        check_replaceable(destination)
    return destination


def check_file(path: Path, inputs: Inputs = ()) -> Path:
    """Where a file is written: `path`, or what that link leads to, which is replaced as a whole while the link stays.

    Raises InputError, whatever --force says, where there is something else than a file (a folder, a pipe, a device) or
    one of the `inputs`, or where it lies in a folder among them.
    """
    place = target_of(path)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path} is a link that leads to itself. Choose another path.") from error
    if status and not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise InputError(f"{path} is {kind} and not a file, so nothing is written there. Choose another path.")
    if status and any(map(partial(is_stream, status), range(3))):
        raise InputError(f"{path} is this command's own standard input or output. Choose another path.")
    for source in (Path(each) for each in inputs if each):
        if lies_in(place, source):
            where = "is read by this command" if source.is_file() else f"lies in {source}, which this command reads"
            raise InputError(f"{path} {where}, so it is not written. Choose another path.")
    return place


def check_note(path: Path, inputs: Inputs, mark: str | None) -> Path:
    """Check a file that is written without being asked for, as `check_file` does: what is there must be gramlite's.

    That is a file with `mark` in it, which may be "", or an empty one. Raises InputError for somebody's own, whatever --force says.
    """
    place = check_file(path, inputs)
    if place.is_file():
        with place.open("rb") as file:
            held = file.read(LARGEST_NOTE)
        if held and (mark is None or mark.encode() not in held):
            raise InputError(
                f"{path} would be written, too, and what is there is not gramlite's. Choose another output."
            )
    return place


def check_replaceable(path: Path) -> None:
    """Raise InputError for a folder that holds anything but what its own gramlite.json lists; it may be empty."""
    if not path.is_dir():
        return
    try:
        listed = {FOLDER_MANIFEST, *json.loads((path / FOLDER_MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = set()
    for held in path.rglob("*"):
        if (held.is_symlink() or not held.is_dir()) and str(held.relative_to(path)) not in listed:
            raise InputError(
                f"{path} is no checkpoint and no artifact of gramlite's alone: it holds {held.relative_to(path)}, which "
                "gramlite did not write there. --force will not replace it; move it away, or choose another -o."
            )


def is_stream(status: os.stat_result, descriptor: int) -> bool:
    try:
        return os.path.samestat(status, os.fstat(descriptor))
    except OSError:  # a closed one
        return False


def target_of(path: Path) -> Path:
    """What a link leads to; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def lies_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another one or lies in it, links and a file system without cases seen through."""
    inner = Path(os.path.realpath(inner))  # which passes over links to themselves
    if not outer.exists():
        return inner == Path(os.path.realpath(outer))
    return any(place.exists() and place.samefile(outer) for place in (inner, *inner.parents))


# --- writing -------------------------------------------------------------------------------------------------


@contextmanager
def atomic_output(destination: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `destination`; on success fsync it and rename it into place.

    The caller makes a file or a folder at the yielded path. Until the body returns nothing is seen at
    `destination`; if the body raises, the temporary path is removed and an older artifact stays untouched.
    A link stays, and what it leads to is replaced. `need_bytes` is checked against the disk's free space first.

    Raises InputError when `destination` exists and `force` is false or it is neither a file nor a folder that gramlite
    made, ResourceError when the disk is full.
    """
    destination = Path(destination)
    if destination.is_dir():
        check_replaceable(destination)
    else:
        check_file(destination)
    destination = target_of(destination)
    if not force and destination.exists():
        raise InputError(f"{destination} already exists. Choose another -o, or add --force to replace it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(destination.parent, need_bytes)
    temporary = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary_paths.add(temporary)
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
        temporary_paths.discard(temporary)


@uninterrupted()
def replace_path(source: Path, destination: Path) -> None:
    """Rename `source` over `destination`, a folder over one that gramlite made, and make the rename durable."""
    if source.is_dir() and destination.is_dir():
        check_replaceable(destination)
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
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: object) -> bytes:
    """A value as indented JSON in UTF-8; of a path's bytes that are no UTF-8, the escapes that Python reads back."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GramliteError(f"{path} could not be read: {error.strerror}.") from error


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
    except (OSError, UnicodeDecodeError, ResourceError):
        return None
    return known if len(known) == 64 else None


def remember_sha256(identity: str, digest: str) -> None:
    """Keep a sha256 for later; `identity` is the file's from before it was read."""
    try:
        note = sha256_note(identity)
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(note, force=True) as temporary:
            temporary.write_text(digest, encoding="ascii")
    except (OSError, GramliteError):
        pass  # a read-only cache costs time, not correctness


def sha256_note(identity: str) -> Path:
    return cache_folder() / "sha256" / hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
