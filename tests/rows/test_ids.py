"""A row's id comes back unchanged, value and JSON type, whatever becomes of the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gramlite.cli import run

TEXTS = {"prompt": "q", "response_a": "x", "response_b": "y"}
ITEM = {"prompt": "q", "completions": ["x", "y"]}
OWN = [
    0,
    1,
    -3,
    7.0,
    1e300,
    0.1,
    10**30,
    True,
    False,
    "",
    "1",
    "x",
    "a\nb",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\u202ea",
    "\ud800",
    "e" * 1024,
]
UNREADABLE = [
    {"response_a": None},
    {"response_a": "", "response_b": ""},
    {"response_b": "\0"},
    {"meta": 3},
    {"prompt": 3},
]


def judged(command: str, folder: Path, model: Path, lines: list[Any], *more: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the rows of JSON lines; bytes are lines as they are."""
    source, output = folder / "rows.jsonl", folder / "out.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    source.write_bytes(b"\n".join(texts) + b"\n")
    code = run([command, str(source), "-m", str(model), "--mode", "direct", "-o", str(output), *more])
    return code, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def typed(values: list[Any]) -> list[tuple[type, Any]]:
    return [(type(value), value) for value in values]


@pytest.mark.fault("ids")
@pytest.mark.parametrize(("command", "row"), [("judge", TEXTS), ("rank", ITEM)])
def test_ids_come_back_as_they_are(command: str, row: dict[str, Any], tmp_path: Path, scripted: Path) -> None:
    code, rows = judged(command, tmp_path, scripted, [row | {"id": identifier} for identifier in OWN])
    assert code == 0 and typed([made["id"] for made in rows]) == typed(OWN)


@pytest.mark.fault("ids")
def test_ids_come_back_from_rows_that_cannot_be_judged(tmp_path: Path, scripted: Path) -> None:
    lines = [TEXTS | bad | {"id": identifier} for bad in UNREADABLE for identifier in OWN]
    lines += [{"id": identifier, "text": "of no shape"} for identifier in OWN]
    code, rows = judged("judge", tmp_path, scripted, [TEXTS, *lines])
    assert code == 5 and typed([row["id"] for row in rows]) == typed(["1", *OWN * (len(UNREADABLE) + 1)])
    assert all(row["verdict"] is None and row["reason"].startswith(f"line {row['line']}: ") for row in rows[1:])


@pytest.mark.fault("ids")
def test_ids_come_back_from_items_that_cannot_be_ranked(tmp_path: Path, scripted: Path) -> None:
    lines = [ITEM | {"id": identifier, "completions": bad} for bad in ([], None, [3], [[]]) for identifier in OWN]
    code, rows = judged("rank", tmp_path, scripted, [ITEM, *lines])
    assert code == 5 and typed([row["id"] for row in rows]) == typed(["1", *OWN * 4])


@pytest.mark.fault("ids")
def test_rows_without_an_id_have_their_line_number_and_lines_without_a_row_none(tmp_path: Path, scripted: Path) -> None:
    lines = [TEXTS, TEXTS | {"id": None}, TEXTS | {"id": None, "pair_id": 5}, [1], 3, TEXTS | {"prompt": 3}]
    lines += [b"", b'{"id": "x", ', b'{"id": "\xff"}', b"hello", TEXTS]
    code, rows = judged("judge", tmp_path, scripted, lines)
    assert code == 5 and typed([row["id"] for row in rows]) == typed(
        ["1", "2", 5, "4", "5", "6", None, None, None, "11"]
    )
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize(
    "identifier", [[1], {"a": 1}, [], {}, "e" * 1025, float("nan"), float("inf"), 10**1024], ids=repr
)
def test_an_id_that_cannot_be_given_back_is_refused(identifier: Any, tmp_path: Path, scripted: Path) -> None:
    code, rows = judged("judge", tmp_path, scripted, [TEXTS, TEXTS | {"id": identifier}])
    assert code == 5 and rows[1]["verdict"] is None and rows[1]["id"] == "2"
    assert rows[1]["reason"].startswith("line 2: id must be ")


@pytest.mark.fault("ids")
def test_resuming_keeps_ids(tmp_path: Path, scripted: Path) -> None:
    lines = [TEXTS | {"id": identifier} for identifier in OWN]
    judged("judge", tmp_path, scripted, [*lines[:5], TEXTS | {"id": 9, "prompt": 9}])
    code, rows = judged("judge", tmp_path, scripted, [*lines, TEXTS | {"id": 9, "prompt": "9"}], "--resume")
    assert code == 0 and typed([row["id"] for row in rows]) == typed([*OWN, 9])


def benched(folder: Path, model: Path, suite: str, rows: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    source, made = folder / "pairs.jsonl", folder / "run"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code = run(["bench", "run", f"{suite}:{source}", "-m", str(model), "--mode", "direct", "-o", str(made)])
    path = made / "rows.jsonl"
    return code, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.mark.fault("ids")
@pytest.mark.parametrize("suite", ["pairs", "judgebench"])
def test_a_benchmark_keeps_ids(suite: str, tmp_path: Path, scripted: Path, capfdbinary: Any) -> None:
    own = [identifier for identifier in OWN if identifier != "1"]
    rows = [TEXTS | {"id": identifier, "label": "AB"[n % 2], "subset": "s"} for n, identifier in enumerate(own)]
    code, made = benched(tmp_path, scripted, suite, rows)
    assert code == 0 and typed([row["id"] for row in made]) == typed(own)
    assert json.loads(capfdbinary.readouterr().out)["score"]["missing"] == 0
    assert run(["bench", "compare", str(tmp_path / "run"), str(tmp_path / "run"), "--json"]) == 0


@pytest.mark.fault("ids")
def test_ids_that_differ_in_type_alone_are_no_ids_of_a_benchmark(tmp_path: Path, scripted: Path, capsys: Any) -> None:
    rows = [TEXTS | {"id": identifier, "label": "A"} for identifier in (1, 1.0, True, "1")]
    assert benched(tmp_path, scripted, "pairs", rows)[0] == 2
    assert "id '1' is there twice" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": i, "verdict": "A", "orders": []}) + "\n" for i in (1, "1"))
    )
    assert run(["bench", "compare", str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl")]) == 2
    assert "differ in type alone" in capsys.readouterr().err
