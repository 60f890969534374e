"""The measurement of voting and ranking: what the contenders do, and that they take turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import uses
from fakes import request_for
from gramlite.bench.turns import Contender

from gramlite.generation.request import Request
from gramlite.judging.pair import Pair

ROWS = [Pair("q" * n, "a" * n, "b" * n) for n in range(1, 12)]


class Recorder:
    vocabulary = "words"

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def start(self, request: Request) -> bool:
        self.asked.append(request)
        return True


def test_a_backend_without_reuse_reuses_nothing_and_is_the_same_otherwise() -> None:
    backend = Recorder()
    without_reuse = uses.WithoutReuse(backend)
    assert without_reuse.start(request_for(1, (1, 2, 3), (2,))) and without_reuse.vocabulary == "words"
    (asked,) = backend.asked
    assert (asked.key, asked.prompt, asked.splits) == (1, (1, 2, 3), ())


def test_tasks_are_middling_prompts_with_responses_of_a_length() -> None:
    tasks = uses.ranking_tasks(ROWS, count=4, limit=2)
    assert [len(task.prompt) for task in tasks] == [4, 5]
    assert [len(text) for text in json.loads(tasks[0].response_a)] == [4, 5, 6, 7]


def test_contenders_take_turns_and_ratios_come_last() -> None:
    order: list[str] = []
    contenders = [Contender(name, lambda pairs, name=name: order.append(name)) for name in "ab"]  # type: ignore[misc]
    said: list[dict[str, Any]] = []
    uses.measure(contenders, ROWS[:4], 1, said.append)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert [row.get("group") for row in said] == [0, 1, 2, 3, None]
    (ratio,) = said[-1]["ratios"]
    assert (ratio["slower"], ratio["faster"], ratio["turns"]) == ("b", "a", 4)


def test_rankings_on_a_model(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": p.prompt, "response_a": p.response_a, "response_b": p.response_b}) + "\n"
            for p in ROWS
        )
    )
    monkeypatch.setattr(
        sys, "argv", ["uses", "ranking", str(pairs), "-m", str(scripted), "--limit", "2", "--responses", "3"]
    )
    uses.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row["seconds"]) for row in rows] == [{"rank --method full", "one by one"}] * 2
