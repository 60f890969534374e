"""Labels in every encoding that data sets use: the documented winner, none for null and "", or an error that names it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from labelled_files import Row, bench_labels, pairs_file

from gramlite.cli import run
from gramlite.errors import InputError
from gramlite.rows import label_from, pair_from_json, read_rows

fault = pytest.mark.fault("labels")
REFUSED = "refused"
NAN = float("nan")


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
    "Arena 55k": (
        "",
        [one_hot(1, 0, 0), one_hot(0, 1, 0), one_hot(0, 0, 1), one_hot(None, None, None)],
        ["A", "B", "tie", None],
    ),
    "Arena 55k, as text": (
        "",
        [one_hot("1", "0", "0"), one_hot("0", "1", "0"), one_hot(False, False, True)],
        ["A", "B", "tie"],
    ),
    "MT-Bench": ("winner", ["model_a", "model_b", "tie", "tie (inconsistent)"], ["A", "B", "tie", "tie"]),
    "FastChat": ("winner", ["model_1", "model_2", "tie"], ["A", "B", "tie"]),
    "Arena-Hard": (
        "label",
        ["A>>B", "A>B", "A=B", "B>A", "B>>A", "B<A", "B<<A", "A<B", "A<<B", "B=A"],
        ["A", "A", "tie", "B", "B", "A", "A", "B", "B", "tie"],
    ),
    "AlpacaEval": ("preference", [1, 2, 1.5, 1.0000001, 1.49, 1.51, None], ["A", "B", "tie", "A", "A", "B", None]),
    "AlpacaEval, the baseline always": ("preference", [1, 1.0], ["A", "A"]),
    "RewardMATH": ("chosen_position", ["A", "B"], ["A", "B"]),
    "sentences": (
        "label",
        ["Response A", "response b", " Assistant A ", "assistant_b", "MODEL A", "Output (b)", "answer-a"],
        ["A", "B", "A", "B", "A", "B", "A"],
    ),
    "brackets": (
        "label",
        ["[[A]]", "[[B]]", "[A]", "(b)", '"A"', "[[A>>B]]", "[[ B > A ]]", "[[C]]"],
        ["A", "B", "A", "B", "A", "A", "B", "tie"],
    ),
    "places": ("label", ["first", "Second", "response 1", "Response_2"], ["A", "B", "A", "B"]),
    "ties": (
        "label",
        ["tie", "TIE", "draw", "bothbad", "Both Bad", "tie (both bad)", "Tie(inconsistent)"],
        ["tie"] * 7,
    ),
    "a later column": ("", [{"label": None, "winner": "model_b"}, {"label": "", "preference": 1.2}], ["B", "A"]),
}
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
    "beyond all floats": ("label", [1, 2, 10**400], "label 1 ", 1, ""),
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
    "one hot, one odd": ("label", [[1, "x"]], "label [1, 'x'] ", 1, ""),
    "one hot, one half": ("label", [[0.5, 1]], "label [0.5, 1] ", 1, ""),
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
}


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
def test_the_refusal_says_what_to_do() -> None:
    from gramlite.rows import Labels, parse_labels

    rows = [{"label": value} for value in (*range(12), 0.5, "x")]
    with pytest.raises(InputError, match="label holds the numbers 0, 0.5, 1, 2, 3, 4, 5, 6; .* --labels 0=A,1=B,2=tie"):
        Labels(rows).read(rows[0])
    with pytest.raises(InputError, match=r"A, B or tie .* Response A, \[\[A\]\].* null .* is none.* --labels yes=A"):
        Labels(rows).read(rows[-1])
    with pytest.raises(InputError, match="--labels says it of 0, 1 only"):
        Labels(rows, parse_labels("0=A,1=B")).read(rows[2])
    with pytest.raises(InputError, match='^the label "x{78}… is not understood'):
        label_from("x" * 200)
    with pytest.raises(InputError, match='^the label "x{78}" is not understood'):
        label_from("x" * 78)


@fault
@pytest.mark.parametrize("said", ["", "0", "0=C", "=A", "0=A,,1=B", "0=A,1=B,0=B", "1=A,1.0=B", "0=A;1=C"])
def test_labels_said_badly_are_a_usage_error(said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", ["A", "B"])
    assert run(["bench", "run", f"pairs:{pairs}", f"--labels={said}", "-m", "absent", "-o", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert f"--labels {said}" in message and "absent" not in message


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
    assert judged.value is not None and judged.error is None
    read = outcome(lambda: pair_from_json(json.loads(line)).label)
    assert judged.value.label == (None if read == REFUSED else read)
