"""Files that version 0.1.0 wrote still open, or are refused in words (see written_by_0_1_0/README.md)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramlite.cli import run

Command = Callable[..., tuple[int, str, str]]
WRITTEN = Path(__file__).with_name("written_by_0_1_0")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the files, which a test may change."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "old"))


@pytest.fixture
def gramlite(capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    """Runs a command line; returns its exit code and what stands on standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        written = capfdbinary.readouterr()
        return code, written.out.decode(), written.err.decode()

    return call


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def verdicts_of(path: Path) -> dict[str, float]:
    """p_a by id of the whole rows of a file."""
    return {row["id"]: row["p_a"] for row in rows(path.read_text().rpartition("\n")[0])}


def test_a_gguf_file_with_its_manifest_judges_as_it_did(old: Path, gramlite: Command) -> None:
    code, out, said = gramlite("judge", old / "six.jsonl", "-m", old / "tiny.gguf", "--mode", "direct")
    assert code == 0, said
    judged = {row["id"]: row["p_a"] for row in rows(out)}
    assert judged.keys() == {f"p{number}" for number in range(6)}
    for identifier, p_a in verdicts_of(old / "verdicts.jsonl").items():
        assert judged[identifier] == pytest.approx(p_a, abs=0.01)


def test_a_gptq_folder_judges(old: Path, gramlite: Command) -> None:
    pytest.importorskip("torch")
    code, out, said = gramlite("judge", old / "six.jsonl", "-m", old / "gptq", "--mode", "direct")
    assert code == 0, said
    plain = verdicts_of(old / "verdicts.jsonl")
    for row in rows(out):
        assert row["model"]["format"] == "gguf" or row["model"]["quantization"]
        if row["id"] in plain:
            assert row["p_a"] == pytest.approx(plain[row["id"]], abs=0.2)


def test_a_calibration_is_applied_or_refused_in_words(old: Path, gramlite: Command) -> None:
    """The one stored has a temperature of 100, so every probability is near one half."""
    code, out, said = gramlite("judge", old / "six.jsonl", "-m", old / "tiny.gguf", "--mode", "direct", "--calibrated")
    if code == 0:
        assert all(row["p_a"] == pytest.approx(0.5, abs=0.02) for row in rows(out))
    else:
        assert code == 2
        assert "gramlite calibrate" in said


def test_a_budget_is_applied_or_refused_in_words(old: Path, gramlite: Command) -> None:
    code, out, said = gramlite("judge", old / "six.jsonl", "-m", old / "tiny.gguf", "--budget", "auto")
    if code == 0:
        assert all(order["tokens"]["generated"] <= 64 for row in rows(out) for order in row["orders"])
    else:
        assert code == 2
        assert "gramlite calibrate" in said


def test_an_interrupted_journal_is_gone_on_with_or_refused_in_words(old: Path, gramlite: Command) -> None:
    before = verdicts_of(old / "verdicts.jsonl")
    assert len(before) == 4
    code, out, said = gramlite(
        "judge",
        old / "six.jsonl",
        "-m",
        old / "tiny.gguf",
        "--mode",
        "direct",
        "-o",
        old / "verdicts.jsonl",
        "--resume",
    )
    if code == 0:
        found = [row["id"] for row in rows((old / "verdicts.jsonl").read_text())]
        assert sorted(found) == [f"p{number}" for number in range(6)]
    else:
        assert code == 6
        assert "was made differently" in said
        assert verdicts_of(old / "verdicts.jsonl") == before


def test_a_run_folder_is_compared(old: Path, gramlite: Command) -> None:
    pytest.importorskip("scipy")
    code, out, said = gramlite("bench", "compare", old / "run", old / "run", "--json")
    assert code == 0, said
    assert json.loads(out.splitlines()[0])


@pytest.mark.fault("removals")
def test_a_file_that_needs_a_companion_is_refused(old: Path, gramlite: Command) -> None:
    code, out, said = gramlite("judge", old / "six.jsonl", "-m", old / "companion.gguf", "--mode", "direct")
    assert code == 3
    assert "companion" in said
    (old / "companion.gguf.json").unlink()
    code, out, said = gramlite("judge", old / "six.jsonl", "-m", old / "companion.gguf", "--mode", "direct")
    assert code == 3
    assert "companion" in said
