"""What a sweep makes on the way: each target once, in a process of its own, and again only when its recipe changed.

Beside a target lies `<name>.recipe.json`: what it was made with and the sha256 of its files. It is written last, so
that a target whose making was killed is made anew.
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
class Target:
    """A file or folder that `build` makes from the targets it needs; `recipe` is all that its bytes depend on."""

    path: Path
    recipe: Mapping[str, Any]
    build: Build
    needs: tuple[Target, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """The recipe with those of its needs, as it is kept beside the target."""
        return {**self.recipe, "needs": [need.record for need in self.needs]}

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.recipe.json")


@dataclass
class Builder:
    """Makes targets with `run`, tells `begin` their names, and makes no target twice that failed once."""

    run: Callable[[Target], None]
    begin: Callable[[str], None] = lambda name: None
    failed: dict[Path, GramliteError] = field(default_factory=dict)

    def ensure(self, target: Target) -> Path:
        """The target's path, after making it and what it needs where that is not there; raises GramliteError."""
        if target.path in self.failed:
            raise self.failed[target.path]
        try:
            for need in target.needs:
                self.ensure(need)
            if not is_intact(target):
                self.begin(target.path.name)
                target.note.unlink(missing_ok=True)
                target.path.parent.mkdir(parents=True, exist_ok=True)
                self.run(target)
                write_json(target.note, {"recipe": target.record, "files": files_of(target.path)})
        except GramliteError as error:
            self.failed[target.path] = error
            raise
        return target.path


def files_of(path: Path) -> dict[str, str]:
    """The files of a target and their sha256: what its manifest lists, where it has one."""
    manifest = read_manifest(path)
    return manifest.files if manifest and manifest.files else hash_files(path)


def is_intact(target: Target) -> bool:
    """Whether a target is there, was made by this recipe, and has the bytes it had then."""
    try:
        note = json.loads(target.note.read_text(encoding="utf-8"))
        files = dict(note["files"])
        if note["recipe"] != json.loads(json.dumps(target.record)) or not target.path.exists() or not files:
            return False
        verify_files(target.path, Manifest(format="target", name=target.path.name, files=files))
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        return False
    return not target.path.is_dir() or (target.path / FOLDER_MANIFEST).is_file()


def remove_leftovers(folder: Path) -> None:
    """Remove what builds that were killed have left; for whoever holds the folder's lock."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            remove_path(path)


def build_in_child(target: Target, log: Path) -> None:
    """Make a target in a process of its own, which a crash of native code ends instead of this one.

    All that the process prints goes to `log`. Raises the GramliteError it met, or one that says how it ended.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_build_and_report, args=(target.build, target.path, log, sender), name=f"make {target.path.name}"
    )
    with children_ignoring_interrupts():
        process.start()
    sender.close()
    try:
        error = receiver.recv()
        process.join(timeout=30)
    except EOFError:
        process.join()
        error = GramliteError(
            f"The process that made {target.path.name} ended with exit code {process.exitcode}. Its last words are in {log}."
        )
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise error


@contextmanager
def children_ignoring_interrupts() -> Iterator[None]:
    """Have processes that are started here not hear a terminal's Ctrl-C, which ends them through this one."""
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield


def _build_and_report(build: Build, path: Path, log: Path, sender: Connection) -> None:
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
    """A sweep that is killed leaves no build behind that would write beside the next one."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
