"""What a sweep makes on the way: each part once, in a process of its own, and again only when its recipe changed.

Beside a part lies `<name>.recipe.json`: what it was made with and the sha256 of its files. It is written last, so
that a part whose making was killed is made anew.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gramlite.errors import GramliteError, ModelError
from gramlite.formats.artifact import Manifest, hash_files, read_manifest, verify_files
from gramlite.storage import FOLDER_MANIFEST, remove_path, write_json

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")  # as `atomic_output` calls them
Build = Callable[[Path], object]


@dataclass(frozen=True)
class Part:
    """A file or folder that `build` makes from the parts it needs; `recipe` is all that its bytes depend on."""

    path: Path
    recipe: Mapping[str, Any]
    build: Build
    needs: tuple[Part, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """The recipe with those of its needs, as it is kept beside the part."""
        return {**self.recipe, "needs": [need.record for need in self.needs]}

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.recipe.json")


@dataclass
class Workshop:
    """Makes parts with `run`, tells `begin` their names, and makes no part twice that failed once."""

    run: Callable[[Part], None]
    begin: Callable[[str], None] = lambda name: None
    failed: dict[Path, GramliteError] = field(default_factory=dict)

    def ensure(self, part: Part) -> Path:
        """The part's path, after making it and what it needs where that is not there; raises GramliteError."""
        if part.path in self.failed:
            raise self.failed[part.path]
        try:
            for need in part.needs:
                self.ensure(need)
            if not is_intact(part):
                self.begin(part.path.name)
                part.note.unlink(missing_ok=True)
                part.path.parent.mkdir(parents=True, exist_ok=True)
                self.run(part)
                write_json(part.note, {"recipe": part.record, "files": files_of(part.path)})
        except GramliteError as error:
            self.failed[part.path] = error
            raise
        return part.path


def files_of(path: Path) -> dict[str, str]:
    """The files of a part and their sha256: what its manifest lists, where it has one."""
    manifest = read_manifest(path)
    return manifest.files if manifest and manifest.files else hash_files(path)


def is_intact(part: Part) -> bool:
    """Whether a part is there, was made by this recipe, and has the bytes it had then."""
    try:
        note = json.loads(part.note.read_text(encoding="utf-8"))
        files = dict(note["files"])
        if note["recipe"] != json.loads(json.dumps(part.record)) or not part.path.exists() or not files:
            return False
        verify_files(part.path, Manifest(format="part", name=part.path.name, files=files))
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        return False
    return not part.path.is_dir() or (part.path / FOLDER_MANIFEST).is_file()


def sweep_leftovers(folder: Path) -> None:
    """Remove what makers that were killed have left; for whoever holds the folder's lock."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            remove_path(path)


def in_child(part: Part, log: Path) -> None:
    """Make a part in a process of its own, which a crash of native code ends instead of this one.

    All that the process prints goes to `log`. Raises the GramliteError it met, or one that says how it ended.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_make, args=(part.build, part.path, log, sender), name=f"make {part.path.name}")
    with deaf_children():
        process.start()
    sender.close()
    try:
        error = receiver.recv()
        process.join(timeout=30)
    except EOFError:
        process.join()
        error = GramliteError(
            f"The process that made {part.path.name} ended with exit code {process.exitcode}. Its last words are in {log}."
        )
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise error


@contextmanager
def deaf_children() -> Iterator[None]:
    """Have processes that are started here not hear a terminal's Ctrl-C, which ends them through this one."""
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield


def _make(build: Build, path: Path, log: Path, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as words:
        for descriptor in (1, 2):
            os.dup2(words.fileno(), descriptor)
    try:
        build(path)
    except GramliteError as error:
        sender.send(error)
    except Exception as error:
        import traceback

        traceback.print_exc()
        sender.send(GramliteError(f"{type(error).__name__}: {error} (the details are in {log})"))
    else:
        sender.send(None)


def _end_with_parent() -> None:
    """A sweep that is killed leaves no maker behind that would write beside the next one."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
