"""Labels in suites, run folders and sweeps: read by the suite's own rule or the common one, or named and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl
from gramlite.bench.suites import open_suite, suite_names
from labelled_files import Row, bench_labels, pairs_file

from gramlite.cli import run

fault = pytest.mark.fault("labels")


@fault
def test_a_run_goes_on_only_with_what_was_said_of_its_labels(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, folder = pairs_file(tmp_path / "pairs.jsonl", [0, 1, 0, 1]), tmp_path / "run"
    command = ["bench", "run", f"pairs:{pairs}", "-m", str(scripted), "--mode", "direct", "-o", str(folder), "--labels"]
    assert run([*command, "0=A,1=B"]) == 0
    before = (folder / "rows.jsonl").read_bytes()
    capsys.readouterr()
    assert run([*command, "0=B,1=A", "--resume"]) == 6
    assert "labels" in capsys.readouterr().err and (folder / "rows.jsonl").read_bytes() == before
    assert run([*command, "1=b, 0 = A", "--resume"]) == 0 and (folder / "rows.jsonl").read_bytes() == before
    assert json.loads((folder / "run.json").read_text())["suite"]["labels"] == {"0": "A", "1": "B"}


@fault
@pytest.mark.parametrize("suite", sorted({*suite_names()} - {"pairs"}))
def test_a_suite_that_knows_its_labels_is_told_nothing(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", ["A", "B"])
    command = ["bench", "run", f"{suite}:{pairs}", "--labels", "0=A,1=B", "-m", "absent", "-o", str(tmp_path / "run")]
    assert run(command) == 2
    assert f"The suite {suite} knows" in (message := capsys.readouterr().err) and f"pairs:{pairs}" in message


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
OFFICIAL: dict[str, Row] = {
    "autoj": {"scenario": "chitchat", "prompt": "q", "response 1": "x", "response 2": "y", "label": 0},
    "pandalm": {"idx": 0, "instruction": "q", "input": "", "response1": "x", "response2": "y",
                "annotator1": 1, "annotator2": 1, "annotator3": 1},
    "llmbar": {"input": "q", "output_1": "x", "output_2": "y", "label": 1},
    "judgebench": {"pair_id": "1", "source": "livebench-math", "question": "q", "response_A": "x", "response_B": "y",
                   "label": "A>B"},
    "mtbench": {"question_id": 1, "model_a": "m", "model_b": "n", "winner": "model_a", "judge": "expert_1", "turn": 1,
                "conversation_a": MESSAGES, "conversation_b": MESSAGES},
    "hhh": {"input": "q", "targets": {"choices": ["x", "y"], "labels": [1, 0]}},
}  # fmt: skip
OFFICIAL_REFUSED = [
    *[("autoj", value) for value in (3, "0", 1.0, 2.0, True, None, "A", [0])],
    *[("pandalm", value) for value in (7, "1", 1.0, True, None, "Tie", [0])],
    *[("llmbar", value) for value in (0, 3, "0", 1.0, True, None, "A", [1])],
    *[("judgebench", value) for value in ("A=B", "a>b", None, 1, ["A>B"])],
    *[("mtbench", value) for value in ("error", "model_1", "m", "", None, 1)],
    *[("hhh", value) for value in ([1, 1], [0, 0], [1, 0, 0], [1], "10", None, [0, "1"], [{}, []])],
]


def with_label(suite: str, value: Any) -> Row:
    if suite == "hhh":
        return OFFICIAL[suite] | {"targets": {"choices": ["x", "y"], "labels": value}}
    return OFFICIAL[suite] | {{"mtbench": "winner", "pandalm": "annotator2"}.get(suite, "label"): value}


@fault
@pytest.mark.parametrize(("suite", "value"), OFFICIAL_REFUSED)
def test_a_suites_own_label_is_read_by_its_rule_or_named(
    suite: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (OFFICIAL[suite], with_label(suite, value))))
    assert run(["bench", "run", f"{suite}:{path}", "-m", "absent", "-o", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    named = {True: "true", None: "null"}.get(value if value is None or value is True else "", json.dumps(value))
    assert "record 2: " in message and (named in message or (isinstance(value, list) and str(value) in message))


@pytest.mark.parametrize(
    ("suite", "labels", "expected"),
    [
        ("autoj", [0, 1, 2], ["A", "B", "tie"]),
        ("pandalm", [1, 2], ["A", "A"]),
        ("llmbar", [1, 2, "1", "2"], ["A", "B", "A", "B"]),
        ("mtbench", ["model_a", "model_b", "tie", "tie (inconsistent)"], ["A", "B", "tie", "tie"]),
    ],
)
def test_a_suites_own_encoding(suite: str, labels: list[Any], expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    rows = [with_label(suite, label) | {"question_id": n, "idx": n} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, module, found = open_suite(f"{suite}:{path}")
    assert [pair.label for pair in module.load(found)] == expected


@fault
@pytest.mark.parametrize("value", [[1, 0], {"x": 1}, 0, "garbage"])
@pytest.mark.parametrize("suite", ["autoj", "pandalm", "rmbench"])
def test_gramlites_own_schema_in_a_suite_follows_the_rule(
    suite: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pairs_file(
        tmp_path / "suite.jsonl", [{"label": label, "meta": {"cell": [0, 0]}} for label in ("Response A", value)]
    )
    if value == [1, 0]:
        _, module, found = open_suite(f"{suite}:{path}")
        assert [pair.label for pair in module.load(found)] == ["A", "A"]
    else:
        assert run(["bench", "run", f"{suite}:{path}", "-m", "absent", "-o", str(tmp_path / "run")]) == 2
        assert "record 2: the label" in capsys.readouterr().err


@fault
@pytest.mark.parametrize("value", [0, 1, "garbage", True])
def test_judged_rows_with_other_labels_are_not_compared(
    value: Any, scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_labels(tmp_path, scripted, ["A", "B"])
    rows = [row | {"label": value} for row in read_jsonl(tmp_path / "run/rows.jsonl")]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert run(["bench", "compare", str(tmp_path / "run"), str(other)]) == 2
    assert f"line 1: the label {json.dumps(value)} is not understood" in capsys.readouterr().err
    other.write_text("".join(json.dumps(row | {"label": "Response A"}) + "\n" for row in rows[:1]))
    assert run(["bench", "compare", str(tmp_path / "run"), str(other)]) == 0


@fault
def test_a_report_finds_the_pairs_whose_labels_were_explained(scripted: Path, tmp_path: Path) -> None:
    from gramlite.bench.flips import pair_texts
    from gramlite.bench.folder import read_run

    bench_labels(tmp_path, scripted, [0, 1], said="0=A,1=B")
    assert set(pair_texts([read_run(tmp_path / "run")])) == {"1", "2"}


def sweep_command(tmp_path: Path, scripted: Path, *suites: str) -> list[str]:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text("{}")
    asked = [part for suite in suites for part in ("--suite", suite)]
    return ["bench", "sweep", str(checkpoint), "--types", f"base={scripted}", *asked, "-o", str(tmp_path / "sweep")]


@fault
def test_a_sweep_explains_the_labels_of_own_pairs_alone(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, autoj = pairs_file(tmp_path / "pairs.jsonl", [0, 1]), tmp_path / "autoj.jsonl"
    autoj.write_text("".join(json.dumps(with_label("autoj", label)) + "\n" for label in (0, 1, 2)))
    command = sweep_command(tmp_path, scripted, f"pairs:{pairs}", f"autoj:{autoj}")
    assert run(command) == 2
    assert "line 1: the label 0 " in capsys.readouterr().err and not (tmp_path / "sweep").exists()
    assert run([*command, "--labels", "0=B,1=A"]) == 0
    labels = {
        suite: [row["label"] for row in read_jsonl(tmp_path / f"sweep/runs/{suite}/base/rows.jsonl")]
        for suite in ("pairs", "autoj")
    }
    assert labels == {"pairs": ["B", "A"], "autoj": ["A", "B", "tie"]}
    capsys.readouterr()
    assert run([*command, "--labels", "0=A,1=B"]) == 6
    assert "labels" in capsys.readouterr().err
    only = sweep_command(tmp_path, scripted, f"autoj:{autoj}")
    assert run([*only, "--labels", "0=A,1=B"]) == 2 and "The suite autoj knows" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [["A", "B"], ["A", None]])
def test_pairs_without_a_label_are_noted(labels: list[Any], scripted: Path, tmp_path: Path) -> None:
    bench_labels(tmp_path, scripted, labels)
    notes = json.loads((tmp_path / "run/run.json").read_text())["score"]["notes"]
    assert [note for note in notes if "no label" in note] == (
        ["1 pairs have no label and count only for consistency and flips."] if None in labels else []
    )
