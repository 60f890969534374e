from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gramlite.cli import run
from gramlite.errors import InputError, IntegrityError, ResourceError
from gramlite.rows.journal import Journal, differences

RECORD: dict[str, Any] = {"settings": {"mode": "direct", "budget": 3}, "model": {"name": "m", "sha256": "0"}}


def row(number: int, verdict: str | None = "A") -> dict[str, Any]:
    return {"id": str(number), "verdict": verdict, "input": f"digest-{number}", "settings": "h", "model": {"name": "m"}}


def write(path: Path, *rows: dict[str, Any], **options: Any) -> None:
    with Journal(path, record=RECORD, **options) as journal:
        for one in rows:
            journal.append(one)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_journal_keeps_whole_rows_with_a_verdict(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row(1), row(2, None), row(3))
    with path.open("ab") as file:
        file.write(b'{"id": "4", "verdict": "A", "inp')
    with Journal(path, record=RECORD, resume=True) as journal:
        assert journal.kept == {"digest-1": 1, "digest-3": 1}
        journal.append(row(2))
    assert [one["id"] for one in read(path)] == ["1", "3", "2"]


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row(1))
    with pytest.raises(InputError, match="--resume"):
        write(path, row(2))
    write(path, row(2), force=True)
    assert [one["id"] for one in read(path)] == ["2"]


def test_changed_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row(1))
    changed = {"settings": {"mode": "direct", "budget": 9}, "model": {"name": "m", "sha256": "1"}}
    with pytest.raises(IntegrityError, match=r'model.sha256: "0" → "1"; settings.budget: 3 → 9'):
        Journal(path, record=changed, resume=True)
    assert [one["id"] for one in read(path)] == ["1"]


def test_without_its_record_the_rows_themselves_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row(1))
    (tmp_path / "out.jsonl.run.json").unlink()
    with pytest.raises(IntegrityError, match="settings_hash"):
        Journal(path, record={"settings_hash": "other", "model": {"name": "m"}}, resume=True)
    Journal(path, record={"settings_hash": "h", "model": {"name": "m"}}, resume=True).close()


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, record=RECORD):
        code = (
            "import sys; from pathlib import Path; from gramlite.rows.journal import Journal\n"
            f"try: Journal(Path({str(path)!r}), record={{}}, resume=True)\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said.startswith("IntegrityError") and f"locked by pid {os.getpid()}" in said
    Journal(path, record=RECORD, resume=True).close()


def test_a_full_disk_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path, record=RECORD) as journal:
        assert journal._file
        journal._file.close()
        journal._file = open("/dev/full", "wb", buffering=0)  # type: ignore[assignment]
        with pytest.raises(ResourceError, match="--resume"):
            journal.append(row(1))
        journal._file.close()
        journal._file = None


def test_differences_walk_into_objects() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 → 3", "d: null → 4"]


def batch(folder: Path, rows: int) -> Path:
    path = folder / "pairs.jsonl"
    pairs = ({"id": f"p{n}", "prompt": f"q{n}", "response_a": f"x{n}", "response_b": f"y{n}"} for n in range(rows))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def judge_in_a_child(arguments: list[str]) -> int:
    """Start the command line in a forked process, which saves its imports; returns the process id."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(run(arguments))
    return child


def ends_within(child: int, seconds: float) -> bool:
    """Whether a child process ends by itself in this time; it is reaped when it does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    return False


def test_killed_at_random_points_and_resumed_there_is_one_row_an_input(scripted: Path, tmp_path: Path) -> None:
    pairs = batch(tmp_path, 60)
    began = time.monotonic()
    assert (
        os.waitpid(judge_in_a_child(["judge", str(pairs), "-m", str(scripted), "-o", str(tmp_path / "whole")]), 0)[1]
        == 0
    )
    whole = time.monotonic() - began
    expected = {one["id"]: one for one in read(tmp_path / "whole")}
    assert len(expected) == 60
    kills = attempt = 0
    chooser = random.Random(2)
    while kills < 30 and attempt < 300:
        output = tmp_path / f"out{attempt}.jsonl"
        attempt += 1
        arguments = ["judge", str(pairs), "-m", str(scripted), "-o", str(output), "--resume"]
        began = time.monotonic()
        child = judge_in_a_child(arguments)
        if ends_within(child, chooser.uniform(0, whole)):
            whole = min(whole, time.monotonic() - began)  # the next ones are killed sooner
        else:
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert os.waitpid(judge_in_a_child(arguments), 0)[1] == 0
        rows = read(output)
        assert len(rows) == 60 and {one["id"]: one for one in rows} == expected
    assert kills == 30
