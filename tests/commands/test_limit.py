"""`--limit N`: the first rows alone are judged or ranked, and more of them later with --resume."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gramlite.cli import run

PAIRS = [{"prompt": f"q{n}", "response_a": "x", "response_b": "y", "id": n} for n in range(4)]
ITEMS = [{"prompt": f"q{n}", "completions": ["a", "b"], "id": n} for n in range(4)]


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def identifiers(text: str) -> list[Any]:
    return [json.loads(line)["id"] for line in text.splitlines()]


@pytest.mark.parametrize(("command", "rows"), [("judge", PAIRS), ("rank", ITEMS)])
def test_the_first_rows_are_judged_and_later_more(
    command: str, rows: list[Any], scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = written(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    words = [command, source, "-m", str(scripted), "--mode", "direct"]
    assert run([*words, "--limit", "2"]) == 0
    assert identifiers(capsys.readouterr().out) == [0, 1]
    assert run([*words, "-o", str(output), "--limit", "2"]) == 0
    assert identifiers(output.read_text()) == [0, 1] and "2 judged" in capsys.readouterr().err
    assert run([*words, "-o", str(output), "--limit", "3", "--resume"]) == 0
    assert identifiers(output.read_text()) == [0, 1, 2]
    assert "1 judged, 2 kept from before" in capsys.readouterr().err
    assert run([*words, "-o", str(output), "--limit", "9", "--resume"]) == 0
    assert identifiers(output.read_text()) == [0, 1, 2, 3]


def test_a_line_that_cannot_be_read_is_one_of_them(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "rows.jsonl", [PAIRS[0], "{", PAIRS[1]])
    assert run(["judge", source, "-m", str(scripted), "--mode", "direct", "--limit", "2"]) == 5
    assert identifiers(capsys.readouterr().out) == [0, None]
    assert run(["judge", source, "-m", str(scripted), "--mode", "direct", "--limit", "1"]) == 0


def test_nothing_is_read_past_the_limit(
    scripted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A producer that waits for the verdicts on what it has written gets them."""

    class Producer(io.RawIOBase):
        lines = [json.dumps(row).encode() + b"\n" for row in PAIRS[:2]]

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            assert self.lines, "read on"
            line = self.lines.pop(0)
            buffer[: len(line)] = line
            return len(line)

    stdin = SimpleNamespace(buffer=io.BufferedReader(Producer()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert run(["judge", "-", "-m", str(scripted), "--mode", "direct", "--limit", "2"]) == 0
    assert identifiers(capsys.readouterr().out) == [0, 1]


@pytest.mark.parametrize("limit", ["0", "-1", "two"])
def test_a_limit_is_a_number_from_1(limit: str, scripted: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", PAIRS)
    assert run(["judge", source, "-m", str(scripted), "--limit", limit]) == 2
