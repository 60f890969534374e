"""Labels in every encoding that data sets use: the documented winner, none for null and "", or an error that names it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl
from gramlite.bench.suites import open_suite, suite_names
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramlite.backends.scripted import ScriptedBackend
from gramlite.cli import run
from gramlite.decoding import Generation
from gramlite.errors import InputError
from gramlite.rows import label_from, pair_from_json, read_rows

Row = dict[str, Any]
fault = pytest.mark.fault("labels")
REFUSED = "refused"
NAN = float("nan")


def pairs_file(path: Path, labels: Sequence[Any], column: str = "label") -> Path:
    """One pair a label; a label that is a dict is a row's columns."""
    rows: list[Row] = [
        {"prompt": f"q{n}", "response_a": f"x{n}", "response_b": f"y{n}"}
        | (label if isinstance(label, dict) else {column: label})
        for n, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench_labels(tmp_path: Path, model: Path, labels: Sequence[Any], column: str = "label", said: str = "") -> list[Any]:
    """What `bench run` takes for the labels of a file."""
    pairs, folder = pairs_file(tmp_path / "pairs.jsonl", labels, column), tmp_path / "run"
    command = ["bench", "run", f"pairs:{pairs}", "-m", str(model), "--mode", "direct", "-o", str(folder)]
    assert run([*command, *([f"--labels={said}"] if said else [])]) == 0
    return [row["label"] for row in read_jsonl(folder / "rows.jsonl")]


def one_hot(a: Any, b: Any, tie: Any) -> Row:
    return {"winner_model_a": a, "winner_model_b": b, "winner_tie": tie}


UNDERSTOOD: dict[str, tuple[str, list[Any], list[Any]]] = {
    "JudgeBench": ("label", ["A>B", "B>A", "A=B", None], ["A", "B", "tie", None]),
    "LLMBar": ("label", [1, 2, 2, None], ["A", "B", "B", None]),
    "LLMBar, winner": ("winner", ["1", "2", None], ["A", "B", None]),
    "as floats": ("label", [1.0, 2.0, ""], ["A", "B", None]),
    "HHH": ("label", [[1, 0], [0, 1], [0.0, 1.0]], ["A", "B", "B"]),
    "HHH, its column": ("labels", [[1, 0], [0, 1]], ["A", "B"]),
    "Arena": ("winner", ["model_a", "model_b", "tie", "tie (bothbad)"], ["A", "B", "tie", "tie"]),
    "Arena 140k": ("winner", ["model_a", "model_b", "tie", "both_bad"], ["A", "B", "tie", "tie"]),
    "Arena 55k": ("", [one_hot(1, 0, 0), one_hot(0, 1, 0), one_hot(0, 0, 1), one_hot(None, None, None)],
                  ["A", "B", "tie", None]),
    "Arena 55k, as text": ("", [one_hot("1", "0", "0"), one_hot("0", "1", "0"), one_hot(False, False, True)],
                           ["A", "B", "tie"]),
    "MT-Bench": ("winner", ["model_a", "model_b", "tie", "tie (inconsistent)"], ["A", "B", "tie", "tie"]),
    "FastChat": ("winner", ["model_1", "model_2", "tie"], ["A", "B", "tie"]),
    "Arena-Hard": ("label", ["A>>B", "A>B", "A=B", "B>A", "B>>A", "B<A", "B<<A", "A<B", "A<<B", "B=A"],
                   ["A", "A", "tie", "B", "B", "A", "A", "B", "B", "tie"]),
    "AlpacaEval": ("preference", [1, 2, 1.5, 1.0000001, 1.49, 1.51, None], ["A", "B", "tie", "A", "A", "B", None]),
    "AlpacaEval, the baseline always": ("preference", [1, 1.0], ["A", "A"]),
    "RewardMATH": ("chosen_position", ["A", "B"], ["A", "B"]),
    "sentences": ("label", ["Response A", "response b", " Assistant A ", "assistant_b", "MODEL A", "Output (b)", "answer-a"],
                  ["A", "B", "A", "B", "A", "B", "A"]),
    "brackets": ("label", ["[[A]]", "[[B]]", "[A]", "(b)", '"A"', "[[A>>B]]", "[[ B > A ]]", "[[C]]"],
                 ["A", "B", "A", "B", "A", "A", "B", "tie"]),
    "places": ("label", ["first", "Second", "response 1", "Response_2"], ["A", "B", "A", "B"]),
    "ties": ("label", ["tie", "TIE", "draw", "bothbad", "Both Bad", "tie (both bad)", "Tie(inconsistent)"], ["tie"] * 7),
    "a later column": ("", [{"label": None, "winner": "model_b"}, {"label": "", "preference": 1.2}], ["B", "A"]),
}  # fmt: skip
READ_BEFORE = {"JudgeBench", "LLMBar"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in READ_BEFORE else fault) for n in UNDERSTOOD])
def test_published_encodings_are_read(name: str, scripted: Path, tmp_path: Path) -> None:
    column, labels, expected = UNDERSTOOD[name]
    assert bench_labels(tmp_path, scripted, labels, column) == expected


SAID: dict[str, tuple[str, list[Any], str, list[Any]]] = {
    "zero-based": ("label", [0, 1, 1], "0=A,1=B", ["A", "B", "B"]),
    "Auto-J": ("label", [0, 1, 2], "0=A,1=B,2=tie", ["A", "B", "tie"]),
    "PandaLM": ("label", [0, 1, 2], "0=tie,1=A,2=B", ["tie", "A", "B"]),
    "PandaLM, GPT": ("winner", ["1", "2", "Tie", "garbage"], "garbage=none", ["A", "B", "tie", None]),
    "SHP": ("labels", [1, 0], "1=A,0=B", ["A", "B"]),
    "TL;DR": ("label", ["0", "1"], "0=A,1=B", ["A", "B"]),
    "HelpSteer3": ("overall_preference", [-3, -1, 0, 2], "-3=A,-2=A,-1=A,0=tie,1=B,2=B,3=B", ["A", "A", "tie", "B"]),
    "FastChat": ("winner", ["model_1", "error", "tie"], "error=none", ["A", None, "tie"]),
    "JETTS": ("label", [0, 1, 0.5], "0=A,1=B,0.5=tie", ["A", "B", "tie"]),
    "plus and minus": ("label", [-1, 1, 0], "-1=B,+1=A,0=tie", ["B", "A", "tie"]),
    "true and false": ("label", [True, False], "true=B,false=A", ["B", "A"]),
    "NaN for null": ("preference", [1.7, NAN, 1], "nan=none", ["B", None, "A"]),
    "words": ("label", ["Ja", "nein"], "ja=A, Nein = b", ["A", "B"]),
    "the other way round": ("label", ["A", "B", 1, 2], "A=B,B=A", ["B", "A", "A", "B"]),
    "one of many": ("label", [1, 1, 1], "1=B", ["B", "B", "B"]),
}


@fault
@pytest.mark.parametrize("name", SAID)
def test_what_labels_mean_can_be_said(name: str, scripted: Path, tmp_path: Path) -> None:
    column, labels, said, expected = SAID[name]
    assert bench_labels(tmp_path, scripted, labels, column, said) == expected


NOT_UNDERSTOOD: dict[str, tuple[str, list[Any], str, int, str]] = {
    "zero-based": ("label", [1, 0, 1], "label 1 ", 1, ""),
    "Auto-J": ("label", ["A", 0, 1, 2], "label 0 ", 2, ""),
    "a tie of 0": ("label", [1, 2, 0], "label 1 ", 1, ""),
    "EvalBiasBench": ("label", [1, 1, 1], "label 1 ", 1, ""),
    "only 2": ("label", [None, "2"], 'label "2" ', 2, ""),
    "1 to 3": ("label", [1, 2, 3], "label 1 ", 1, ""),
    "text and numbers": ("label", ["1", 2, "0"], 'label "1" ', 1, ""),
    "a half": ("label", [1, 2, 1.5], "label 1 ", 1, ""),
    "SHP": ("labels", [1, 0], "label 1 in labels", 1, ""),
    "HelpSteer3": ("overall_preference", [-3, 1], "label -3 in overall_preference", 1, ""),
    "HelpSteer3, 1 and 2": ("overall_preference", [1, 2], "label 1 in overall_preference", 1, ""),
    "AlpacaEval, old tie": ("preference", [1.3, 0, 2], "label 1.3 in preference", 1, ""),
    "preference, zero-based": ("preference", [1, 0], "label 1 in preference", 1, ""),
    "preference beyond 2": ("preference", [2, 2.5], "label 2 in preference", 1, ""),
    "minus one": ("label", [-1, 1], "label -1 ", 1, ""),
    "true": ("label", ["A", True], "label true ", 2, ""),
    "false": ("winner", ["model_a", False], "label false in winner", 2, ""),
    "NaN": ("label", [1, 2, NAN], "label 1 ", 1, ""),
    "infinite": ("preference", [1, math.inf], "label 1 in preference", 1, ""),
    "garbage": ("label", ["A", "B", "garbage"], 'label "garbage" ', 3, ""),
    "error": ("winner", ["tie", "error"], 'label "error" in winner', 2, ""),
    "tie (error)": ("label", ["tie (error)"], 'label "tie (error)" ', 1, ""),
    "a third": ("label", ["C"], 'label "C" ', 1, ""),
    "a space": ("label", ["A", " "], 'label " " ', 2, ""),
    "null as text": ("label", ["null"], 'label "null" ', 1, ""),
    "a model's name": ("winner", ["gpt-4"], 'label "gpt-4" in winner', 1, ""),
    "both hot": ("label", [[1, 1]], "label [1, 1] ", 1, ""),
    "none hot": ("label", [[0, 0]], "label [0, 0] ", 1, ""),
    "three hot": ("label", [[0, 0, 1]], "label [0, 0, 1] ", 1, ""),
    "an empty list": ("label", [[]], "label [] ", 1, ""),
    "columns, two hot": ("", [one_hot(1, 0, 1)], "label [1, 0, 1] in winner_model_a", 1, ""),
    "columns, none hot": ("", [one_hot(0, 0, 0)], "label [0, 0, 0] in winner_model_a", 1, ""),
    "an object": ("label", ["A", {"label": {"winner": "A"}}], "label {'winner': 'A'} ", 2, ""),
    "an accented a": ("label", ["Á"], 'label "Á" ', 1, ""),
    "a Cyrillic a": ("label", ["А"], 'label "А" ', 1, ""),  # noqa: RUF001
    "a wide digit": ("label", ["１", "2"], 'label "１" ', 1, ""),  # noqa: RUF001
    "not A": ("label", ["-A"], 'label "-A" ', 1, ""),
    "both": ("label", ["A, B"], 'label "A, B" ', 1, ""),
    "model 0": ("winner", ["model_1", "model_0"], 'label "model_0" in winner', 2, ""),
    "model minus 1": ("winner", ["model -1"], 'label "model -1" in winner', 1, ""),
    "a control character": ("label", ["A\x1b[31m"], 'label "A\\u001b[31m" ', 1, ""),
    "said of others": ("label", [0, 1, 2], "label 2 ", 3, "0=A,1=B"),
    "half said": ("label", [0, 1, 2], "label 1 ", 2, "0=A"),
    "half said, 1 and 2": ("label", [2, 1], "label 2 ", 1, "1=B"),
    "a half said of 1 to 2": ("preference", [1, 2, 1.2], "label 1.2 in preference", 3, "1=A,2=B"),
}  # fmt: skip


@fault
@pytest.mark.parametrize("command", ["bench run", "calibrate"])
@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_a_label_that_is_not_understood_is_named_before_a_model_is_opened(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    column, labels, says, line, said = NOT_UNDERSTOOD[name]
    pairs, output = pairs_file(tmp_path / "pairs.jsonl", labels, column), tmp_path / "output"
    asked = ["bench", "run", f"pairs:{pairs}"] if command == "bench run" else ["calibrate", str(pairs)]
    given = [f"--labels={said}"] if said else []
    assert run([*asked, *given, "-m", str(tmp_path / "there-is-no-model.gguf"), "-o", str(output)]) == 2
    captured = capsys.readouterr()
    assert f"line {line}: the {says}" in captured.err and "there-is-no-model" not in captured.err
    assert "--labels" in captured.err and not captured.out and not output.exists()


@fault
@pytest.mark.parametrize("said", ["", "0", "0=C", "=A", "0=A,,1=B", "0=A,1=B,0=B", "1=A,1.0=B", "0=A;1=C"])
def test_labels_said_badly_are_a_usage_error(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", ["A", "B"])
    assert run(["bench", "run", f"pairs:{pairs}", f"--labels={said}", "-m", "absent", "-o", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert f"--labels {said}" in message and "absent" not in message


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


def prefers_the_longer(self: ScriptedBackend, request: Any) -> Generation:
    text = bytes(token for token in request.prompt if token < 256).decode()
    shown = [text.rpartition(f"[The Start of Assistant {side}'s Response]")[2] for side in "AB"]
    first, second = (part.partition("[The End")[0] for part in shown)
    return Generation(margin=math.copysign(2.0, len(first) - len(second)), thinking="", forced=False, generated=0)


@fault
@pytest.mark.parametrize("budget", [[], ["--budget", "auto"]])
def test_calibrate_warns_of_labels_the_other_way_round(
    budget: list[str], tmp_path: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(ScriptedBackend, "_run", prefers_the_longer)
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"q{n}", "response_a": "x" * (1 + n % 2), "response_b": "x" * (2 - n % 2),
         "label": "tie" if n > 29 else "AB"[n % 2]}
        for n in range(36)
    ]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mode = budget or ["--mode", "direct"]
    assert run(["calibrate", str(pairs), "-m", str(scripted), *mode]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["calibration"]["report"]["ties"] == 6
    assert "Warning" in captured.err and "right on 0 of 30 pairs" in captured.err and "the other way round" in captured.err
    assert run(["calibrate", str(pairs), "-m", str(scripted), *mode, "--labels", "A=B,B=A"]) == 0
    assert capsys.readouterr().err == ""


@fault
@pytest.mark.parametrize("right", range(0, 31, 3))
@pytest.mark.parametrize("orders", ["both", "ab"])
def test_the_warning_is_the_exact_binomial_test(right: int, orders: str) -> None:
    import numpy as np
    from scipy.stats import binomtest

    from gramlite.confidence import Labelled, below_chance

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
    pairs = pairs_file(tmp_path / "pairs.jsonl", ["[[A]]", "assistant_b", "A>>B", "second", "draw"] * 8 + [None, "", {}])
    with pairs.open("a") as file:
        file.write('{"prompt": "q", "label": "garbage"}\n{"prompt": "q", "response_a": 1, "response_b": 2, "label": 0}\n')
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
def test_an_unreadable_row_still_says_how_its_file_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", [1, 2])
    with pairs.open("a") as file:
        file.write('{"prompt": "q", "response_a": 1, "response_b": 2, "label": 0}\n')
    assert run(["calibrate", str(pairs), "-m", "absent"]) == 2
    assert "line 1: the label 1 " in capsys.readouterr().err


@fault
def test_the_whole_file_decides_also_under_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", [1, 2, 1, 0])
    assert run(["bench", "run", f"pairs:{pairs}", "--limit", "2", "-m", "absent", "-o", str(tmp_path / "run")]) == 2
    assert "line 1: the label 1 " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["judge", "rank"])
def test_judge_and_rank_carry_a_label_along(command: str, scripted: Path, tmp_path: Path) -> None:
    labels = [None, "A", "garbage", 0, 1, 7, True, NAN, [1, 1], {"x": 1}, "tie (error)"]
    rows = []
    for n, label in enumerate(labels):
        pairs, output = tmp_path / f"{n}.jsonl", tmp_path / f"{n}.out"
        row = {"id": "i", "prompt": "q", "label": label}
        row |= {"completions": ["x", "y"]} if command == "rank" else {"response_a": "x", "response_b": "y"}
        pairs.write_text(json.dumps(row) + "\n")
        assert run([command, str(pairs), "-m", str(scripted), "--mode", "direct", "-o", str(output)]) == 0
        rows.append({key: value for key, value in json.loads(output.read_text()).items() if key != "input"})
    assert all(row == rows[0] for row in rows)


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
    path = pairs_file(tmp_path / "suite.jsonl", ["Response A", {"label": value}])
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


# --- properties ----------------------------------------------------------------------------------------------

SPELLINGS = {
    "A": ["A", "Response A", "[[A]]", "assistant_a", "model_a", "model_1", "first", "A>B", "A>>B", "B<A"],
    "B": ["B", "Response B", "[[B]]", "assistant_b", "model_b", "model_2", "second", "B>A", "B>>A", "A<B"],
    "tie": ["tie", "tie (bothbad)", "both_bad", "tie (inconsistent)", "draw", "A=B"],
}
MIRROR = str.maketrans({"a": "b", "b": "a", "A": "B", "B": "A", "1": "2", "2": "1", "<": ">", ">": "<"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
TEXT = st.text(st.sampled_from("aAbB12<>=[]() _-tie"), max_size=10)
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except InputError:
        return REFUSED


@fault
@QUICK
@given(st.sampled_from([(winner, text) for winner, texts in SPELLINGS.items() for text in texts]), st.data())
def test_case_and_space_never_change_a_side(known: tuple[str, str], data: st.DataObject) -> None:
    winner, text = known
    text = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in text)
    text = text.replace(" ", data.draw(st.sampled_from([" ", "_", "  "])))
    padding = st.sampled_from(["", " ", "\n", "\t "])
    assert label_from(data.draw(padding) + text + data.draw(padding)) == winner


@fault
@QUICK
@given(JSON | TEXT)
def test_any_value_is_a_side_none_or_refused_by_name(value: Any) -> None:
    found = outcome(lambda: label_from(value))
    assert found in ("A", "B", "tie", None, REFUSED)
    assert (found is None) == (value is None or value == "")
    if isinstance(value, list):
        assert found == ("A" if value == [1, 0] else "B" if value == [0, 1] else REFUSED)
    elif not isinstance(value, str | None):
        assert found == REFUSED, "a number, a boolean or an object by itself says nothing"
    if found == REFUSED:
        with pytest.raises(InputError, match="the label .* is not understood"):
            label_from(value)


@fault
@QUICK
@given(TEXT)
def test_what_mirrors_a_label_means_the_other_side(text: str) -> None:
    """Whatever the reader takes for A must, with A and B exchanged, be B, and a tie stay one."""
    swapped = text.replace("first", "second").translate(MIRROR)
    if "i" in text or "t" in text:  # a word: its letters are no sides
        return
    mirrored = {"A": "B", "B": "A"}
    relation = any(c in text for c in "<>")
    found, other = outcome(lambda: label_from(text)), outcome(lambda: label_from(swapped))
    assert other == (found if relation else mirrored.get(found, found))


@fault
@QUICK
@given(st.lists(st.sampled_from([0, 1, 2, 3, -1, 1.5, 1.0, 2.0, "0", "1", "2", None, "", "A", "tie"]), max_size=8))
def test_numbers_are_sides_only_where_a_file_leaves_one_reading(values: list[Any]) -> None:
    from gramlite.rows import Labels

    numbers = {float(value) for value in values if value not in (None, "", "A", "tie")}
    rows = [{"label": value} for value in values]
    labels = Labels(rows)
    for row in rows:
        value = row["label"]
        expected = {None: None, "": None, "A": "A", "tie": "tie"}.get(value, REFUSED)
        if expected == REFUSED and numbers == {1, 2}:
            expected = "A" if float(value) == 1 else "B"
        assert outcome(lambda row=row: labels.read(row)) == expected  # type: ignore[misc]


@fault
@QUICK
@given(st.lists(st.floats(0.9, 2.1) | st.sampled_from([1, 1.5, 2]), min_size=1, max_size=6))
def test_a_preference_counts_from_1_to_2(values: list[float]) -> None:
    from gramlite.rows import Labels

    rows = [{"preference": value} for value in values]
    labels = Labels(rows)
    usable = all(1 <= value <= 2 for value in values) or set(values) == {1, 2}
    for row, value in zip(rows, values, strict=True):
        side = "tie" if value == 1.5 else "A" if value < 1.5 else "B"
        assert outcome(lambda row=row: labels.read(row)) == (side if usable else REFUSED)  # type: ignore[misc]


@QUICK
@given(JSON | TEXT, st.sampled_from(["label", "winner", "preference"]))
def test_a_row_is_judged_whatever_its_label_and_read_with_it_or_refused(value: Any, column: str) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", column: value}
    line = json.dumps(row).encode()
    (judged,) = read_rows(io.BytesIO(line))
    assert judged.pair is not None and judged.error is None
    read = outcome(lambda: pair_from_json(json.loads(line)).label)
    assert judged.pair.label == (None if read == REFUSED else read)
