"""`gramlite calibrate` and labels: which rows count, what is said of them, and a warning where they look reversed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl
from fakes import generation
from labelled_files import pairs_file

from gramlite.backends.scripted import ScriptedBackend
from gramlite.cli import run
from gramlite.generation.decoder import Generation

fault = pytest.mark.fault("labels")


def prefers_the_longer(self: ScriptedBackend, request: Any) -> Generation:
    text = bytes(token for token in request.prompt if token < 256).decode()
    shown = [text.rpartition(f"[The Start of Assistant {side}'s Response]")[2] for side in "AB"]
    first, second = (part.partition("[The End")[0] for part in shown)
    return generation(math.copysign(2.0, len(first) - len(second)), thinking="")


@fault
def test_bench_and_calibrate_are_right_on_zero_based_labels(
    shared: Path, tmp_path: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of these pairs the longer response is the better one; so says the file, and so says the judge."""
    monkeypatch.setattr(ScriptedBackend, "_run", prefers_the_longer)
    rows = list(read_jsonl(shared / "faults/labels-zero-based.jsonl"))
    many = tmp_path / "zero.jsonl"
    many.write_text("".join(json.dumps(row | {"id": f"{row['id']}-{n}"}) + "\n" for n in range(5) for row in rows))
    judging = ["-m", str(scripted), "--mode", "direct"]
    assert run(["bench", "run", f"pairs:{many}", *judging, "-o", str(tmp_path / "run")]) == 2
    assert run(["calibrate", str(many), *judging]) == 2
    capsys.readouterr()
    assert run(["bench", "run", f"pairs:{many}", *judging, "-o", str(tmp_path / "run"), "--labels", "0=A,1=B"]) == 0
    score = json.loads(capsys.readouterr().out)["score"]
    assert score["scores"]["accuracy"] == 1.0 and score["scores"]["agreement_with_ties"] == 1.0 and score["notes"] == []
    assert run(["calibrate", str(many), *judging, "--labels", "0=A,1=B"]) == 0
    captured = capsys.readouterr()
    calibration = json.loads(captured.out)["calibration"]
    assert calibration["temperature"] < 0.2 and calibration["report"]["accuracy_before"] == 1.0
    assert captured.err == ""


@fault
@pytest.mark.parametrize("budget", [[], ["--budget", "auto"]])
def test_calibrate_warns_of_labels_the_other_way_round(
    budget: list[str],
    tmp_path: Path,
    scripted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ScriptedBackend, "_run", prefers_the_longer)
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"q{n}",
            "response_a": "x" * (1 + n % 2),
            "response_b": "x" * (2 - n % 2),
            "label": "tie" if n > 29 else "AB"[n % 2],
        }
        for n in range(36)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mode = budget or ["--mode", "direct"]
    assert run(["calibrate", str(pairs), "-m", str(scripted), *mode]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["calibration"]["report"]["ties"] == 6
    assert (
        "Warning" in captured.err and "right on 0 of 30 pairs" in captured.err and "the other way round" in captured.err
    )
    assert run(["calibrate", str(pairs), "-m", str(scripted), *mode, "--labels", "A=B,B=A"]) == 0
    assert capsys.readouterr().err == ""


@fault
@pytest.mark.parametrize("right", range(0, 31, 3))
@pytest.mark.parametrize("orders", ["both", "ab"])
def test_the_warning_is_the_exact_binomial_test(right: int, orders: str) -> None:
    import numpy as np
    from scipy.stats import binomtest

    from gramlite.judging.confidence import Labelled, below_chance

    outcomes = np.array([1.0, 0.0] * 15 + [0.5] * 4 + [1.0])
    margins = np.where(np.arange(35) < right, 1.0, -1.0) * np.where(outcomes > 0, 1, -1)
    margins[-1] = 0.0  # the judge's tie
    data = Labelled(margins, margins if orders == "both" else margins * np.nan, outcomes, np.arange(35))
    p = binomtest(right, 30).pvalue
    expected = right < 15 and p < 0.05
    found = below_chance(data)
    assert (found is not None) == expected
    if found:
        assert found[:2] == (right, 30) and found[2] == pytest.approx(p)


@fault
def test_only_rows_without_a_label_or_a_pair_are_left_out(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_file(
        tmp_path / "pairs.jsonl", ["[[A]]", "assistant_b", "A>>B", "second", "draw"] * 8 + [None, "", {}]
    )
    with pairs.open("a") as file:
        file.write(
            '{"prompt": "q", "label": "garbage"}\n{"prompt": "q", "response_a": 1, "response_b": 2, "label": 0}\n'
        )
    command = ["calibrate", str(pairs), "-m", str(scripted), "--mode", "direct"]
    assert run(command) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)["calibration"]["report"]
    assert (report["pairs"], report["ties"]) == (40, 8) and "5 of 45 rows are left out" in captured.err
    assert run([*command, "--ties", "drop"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)["calibration"]["report"]
    assert (report["pairs"], report["ties"]) == (32, 0) and "5 of 45 rows are left out" in captured.err


@fault
def test_a_calibration_goes_on_with_labels_read_anew(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, rows = pairs_file(tmp_path / "pairs.jsonl", [0, 1, 1] * 10), tmp_path / "rows.jsonl"
    command = ["calibrate", str(pairs), "-m", str(scripted), "--mode", "direct", "--labels"]
    assert run([*command, "0=B,1=A"]) == 0
    anew = json.loads(capsys.readouterr().out)
    assert run([*command, "0=A,1=B", "-o", str(rows)]) == 0
    capsys.readouterr()
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:17]))
    assert run([*command, "0=B,1=A", "-o", str(rows), "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == anew and len(rows.read_bytes().splitlines()) == 30
