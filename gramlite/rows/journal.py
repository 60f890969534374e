"""Rows on disk: append-only JSON lines that survive a kill, resume without a row lost or doubled, and have one writer.

Beside `OUT.jsonl` lie `OUT.jsonl.run.json`, which records what the rows were made with and the writer's process id,
and `OUT.jsonl.lock`, which is locked while somebody writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from gramlite.errors import InputError, IntegrityError, ResourceError
from gramlite.storage import Inputs, atomic_output, check_file, check_note, fsync_path, write_json

RECORD_MARK = '"pid"'


class Journal:
    """An output file of judged rows that is being written. Use it in a `with` block.

    `record` says what the rows depend on (settings, model); a resumed journal must have the same. `kept` counts the
    rows already there with a verdict, by the digest of their input line.
    """

    def __init__(self, path: Path, *, record: Mapping[str, Any], resume: bool = False, force: bool = False) -> None:
        self.path = path = check_rows(path, resume=resume, force=force)
        self.kept: Counter[str] = Counter()
        self._record = json.loads(json.dumps(record))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(_beside(path, "lock")), timeout=0)
        self._file: BinaryIO | None = None
        try:
            self._lock.acquire()
        except Timeout:
            raise IntegrityError(
                f"{path} is being written: locked by pid {_recorded(path).get('pid', 'unknown')}. Wait for it, or choose another -o."
            ) from None
        try:
            if resume and path.exists():
                self._check_record()
                self._repair()
            else:
                with atomic_output(path, force=True) as empty:
                    empty.touch()
            write_json(_beside(path, "run.json"), {"pid": os.getpid(), **self._record})
            self._file = path.open("ab")
            fsync_path(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row and wait until it is on disk; raises ResourceError when the disk is full."""
        if self._file is None:
            raise ValueError("the journal is closed")
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResourceError(
                f"{self.path} could not be written ({error.strerror}). Free some space, then add --resume to go on."
            ) from error

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_record(self) -> None:
        """Refuse to mix rows made in different ways."""
        previous = _recorded(self.path) or self._record_of_rows()
        previous.pop("pid", None)
        if previous and (changes := differences(previous, {key: self._record.get(key) for key in previous})):
            raise IntegrityError(
                f"{self.path} was made differently: {'; '.join(changes)}. "
                "Use the same options and model to --resume, or choose another -o."
            )

    def _record_of_rows(self) -> dict[str, Any]:
        """Where run.json is lost: the settings hash and the model of the first row there."""
        row = next((row for row, _ in read_journal(self.path) if row), None)
        return {"settings_hash": row.get("settings"), "model": row.get("model")} if row else {}

    def _repair(self) -> None:
        """Keep every whole row with a verdict; drop a torn last line and rows that are to be tried again."""
        with atomic_output(self.path, force=True) as temporary, temporary.open("wb") as file:
            for row, line in read_journal(self.path):
                if row and row.get("verdict") is not None and isinstance(row.get("input"), str):
                    self.kept[row["input"]] += 1
                    file.write(line)


def check_rows(path: Path, inputs: Inputs = (), *, resume: bool, force: bool) -> Path:
    """Refuse an output of rows before any work is done for it; return where it is written, for a link its target.

    Raises InputError where it is there and neither `resume` nor `force` is set, and, even with them, where it or what is
    written beside it is one of the `inputs`, no file, or somebody's own.
    """
    place = check_file(path, inputs)
    check_note(place.with_name(f"{place.name}.run.json"), inputs, RECORD_MARK)
    check_note(place.with_name(f"{place.name}.lock"), inputs, None)
    if place.exists() and not (resume or force):
        raise InputError(f"{path} already exists. Add --resume to go on with it, or --force to start it anew.")
    return place


def read_journal(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Each line of a journal with the row on it, None where the line is torn or no JSON object."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            yield (row if isinstance(row, dict) else None), line


def rows_kept(path: Path) -> int:
    """How many whole lines a journal has."""
    try:
        with path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)
    except OSError:
        return 0


def begun_here(path: Path) -> bool:
    """Whether it is this process that has begun to write a journal."""
    return _recorded(path).get("pid") == os.getpid()


def _recorded(path: Path) -> dict[str, Any]:
    """What lies beside a journal of how it is made; empty where that cannot be read."""
    try:
        value = json.loads(_beside(path, "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two nested records, as `name: old → new`."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {_short(before)} → {_short(after)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"
