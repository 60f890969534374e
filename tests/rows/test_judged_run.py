"""A run over rows: one row an input, in order, on disk before the next is begun, and none judged twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gramlite.errors import InputError, IntegrityError
from gramlite.judging.pair import Pair, Verdict
from gramlite.rows.judged_run import JudgedRun, RowsOutput
from gramlite.rows.lines import Row


class Judge:
    """Prefers A, has no verdict on a pair whose prompt is "none", and reads `ahead` pairs before it answers."""

    settings_hash, settings_record, model = "0123", {"mode": "direct"}, {"name": "fake"}

    def __init__(self, ahead: int = 1) -> None:
        self.ahead, self.judged = ahead, 0

    def many(self, pairs: Iterable[Pair], *, lookahead: bool) -> Iterator[Verdict]:
        waiting: list[Pair] = []
        for pair in pairs:
            waiting.append(pair)
            if len(waiting) == self.ahead:
                yield from map(self.verdict, waiting)
                waiting = []
        yield from map(self.verdict, waiting)

    def verdict(self, pair: Pair) -> Verdict:
        self.judged += 1
        winner = None if pair.prompt == "none" else "A"
        return Verdict(
            id=pair.id, winner=winner, p_a=0.9, margin=2.0, consistent=True, reason=None if winner else "not a number"
        )


class Watcher:
    def __init__(self) -> None:
        self.shown: list[Any] = []

    def show(self, row: Mapping[str, Any], verdict: Verdict | None) -> None:
        self.shown.append(row["line"])

    def advance(self) -> None:
        self.shown.append("kept")


def rows(*prompts: str | None) -> list[Row[Pair]]:
    """A row a prompt, known by it; one that could not be read for None."""
    return [
        Row(number, str(prompt), Pair(prompt, "x", "y", id=number))
        if prompt is not None
        else Row(number, f"bad {number}", None, f"line {number}: no JSON", str(number))
        for number, prompt in enumerate(prompts, 1)
    ]


def judged(
    judge: Judge, prompts: Iterable[str | None], path: Path | None = None, **options: bool
) -> tuple[JudgedRun, list[Any]]:
    watcher = Watcher()
    with JudgedRun(judge, RowsOutput(path=path, **options), watcher) as run:  # type: ignore[arg-type]
        run.judge_pairs(rows(*prompts))
    return run, watcher.shown


def lines_of(path: Path) -> list[tuple[int, str | None]]:
    return [(row["line"], row["reason"]) for row in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize("ahead", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "prompts", [["a", "b", "c"], [None, "a", None, None, "b"], [None, None], ["a", None], [], ["none", None, "a"]]
)
def test_one_row_an_input_in_order(prompts: list[str | None], ahead: int, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    run, shown = judged(Judge(ahead), prompts, path)
    assert shown == list(range(1, len(prompts) + 1))
    reasons = {None: "no JSON", "none": "not a number"}
    expected = [reasons.get(prompt) and f"line {n}: {reasons[prompt]}" for n, prompt in enumerate(prompts, 1)]
    assert lines_of(path) == list(enumerate(expected, 1))
    missing = sum(prompt in reasons for prompt in prompts)
    assert (run.tally["judged"], run.tally["without verdict"]) == (len(prompts) - missing, missing)
    assert run.finish() == (5 if missing else 0)


def test_an_unreadable_row_has_every_field_of_a_judged_one(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    judged(Judge(), ["a", None], path)
    good, bad = map(json.loads, path.read_text().splitlines())
    assert list(bad) == list(good)
    assert bad["verdict"] is bad["p_a"] is bad["margin"] is bad["consistent"] is None and bad["id"] == "2"
    assert bad["settings"] == "0123" and bad["model"] == {"name": "fake"} and bad["orders"] == bad["flags"] == []


def test_rows_of_before_are_kept_each_once(tmp_path: Path) -> None:
    """Of two equal inputs with one row between them, one is judged."""
    path = tmp_path / "out.jsonl"
    judged(Judge(), ["a", "b", "none"], path)
    judge = Judge()
    run, shown = judged(judge, ["a", "a", "b", "none"], path, resume=True)
    assert shown == ["kept", 2, "kept", 4] and judge.judged == 2
    assert run.tally == {"kept": 2, "judged": 1, "without verdict": 1}
    assert sorted(lines_of(path), key=str) == [(1, None), (2, None), (2, None), (4, "line 4: not a number")]


def test_a_run_that_was_made_differently_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    judged(Judge(), ["a"], path)
    other = Judge()
    other.settings_record = {"mode": "think"}
    with pytest.raises(IntegrityError, match='mode: "direct" → "think"'):
        judged(other, ["a", "b"], path, resume=True)
    judge, output = Judge(), RowsOutput(path=path, resume=True)
    with pytest.raises(IntegrityError, match="settings"):
        JudgedRun(judge, output, Watcher(), {"settings_hash": "0123", "settings": 7})  # type: ignore[arg-type]


def test_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="add -o"):
        RowsOutput(resume=True).prepare([])
    path.write_text("")
    with pytest.raises(InputError, match="already exists"):
        RowsOutput(path=path).prepare([])
    with pytest.raises(InputError, match="is read by this command"):
        RowsOutput(path=path, force=True).prepare([path])
    RowsOutput(path=path, force=True).prepare([])
