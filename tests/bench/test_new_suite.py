"""A suite that is added: one file, found by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gramlite.bench import suites

from gramlite.cli import run

COLOURS = '''
"""Colours: the response that names the colour asked for."""

from gramlite.bench import records, scoring

SOURCE = "Get colours.jsonl: JSON lines with question, yes and no."
FILES = ("colours.jsonl",)


def load(path):
    return records.read_pairs(path, pairs_of)


def pairs_of(record, number, where):
    yield records.chosen_pair(
        identifier=f"colours:{number}",
        prompt=records.text(record, "question", where),
        chosen=records.text(record, "yes", where),
        rejected=records.text(record, "no", where),
        meta={"subset": "all"},
    )


def score(rows, pairs):
    matched = scoring.match(rows, pairs)
    return scoring.result(matched, headline="right", scores={"right": scoring.accuracy(matched.judged)})
'''


def test_a_suite_is_one_file(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites/colours.py").write_text(COLOURS)
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path / "suites")])
    assert "colours" in suites.suite_names() and not suites.takes_labels(
        "colours"
    )  # what the help of `bench run` lists
    (tmp_path / "colours.jsonl").write_text('{"question": "q", "yes": "red", "no": "four"}\n')
    folder = tmp_path / "run"
    monkeypatch.setenv("GRAMLITE_BENCHMARKS", str(tmp_path))
    assert run(["bench", "run", "colours", "-m", str(scripted), "-o", str(folder), "--mode", "direct"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["headline"] == "right"
    assert run(["bench", "run", "nothing", "-m", str(scripted), "-o", str(tmp_path / "other")]) == 2
    assert "colours" in capsys.readouterr().err
    assert run(["bench", "run", "colours", "--labels", "0=A", "-m", str(scripted), "-o", str(tmp_path / "other")]) == 2
    assert "knows what its labels mean" in capsys.readouterr().err
