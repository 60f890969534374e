"""Runs against gold margins: the figures from rows made by hand, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gramlite.bench.compare import command
from gramlite.bench.comparison import RunComparison, compare_runs
from gramlite.bench.folder import read_run
from gramlite.bench.measures import GOLD_MEASURES
from gramlite.bench.summary import sentences, summary_table

from gramlite.errors import GateError, InputError

from .conftest import MakeRun, judged_row

Margins = dict[str, tuple[float, float]]
GOLD: Margins = {"p0": (1.0, 2.0), "p1": (-1.0, 0.5), "p2": (3.0, 3.0)}
MINE: Margins = {"p0": (1.5, 1.0), "p1": (0.5, 0.75), "p2": (3.0, 3.0)}
BASE: Margins = {"p0": (1.0, 1.0), "p1": (-1.0, 0.5), "p2": (1.0, 3.0)}


def gold_file(path: Path, margins: Margins) -> Path:
    rows = [
        {"set": "made.jsonl", "id": name, "label": "A", "margin_ab": ab, "margin_ba": ba}
        for name, (ab, ba) in margins.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_at(make_run: MakeRun, name: str, margins: Margins) -> Path:
    return make_run(name, [judged_row(identifier, both) for identifier, both in margins.items()])


def compared(make_run: MakeRun, gold: Path) -> RunComparison:
    base, mine = run_at(make_run, "base", BASE), run_at(make_run, "mine", MINE)
    return compare_runs(read_run(base), read_run(mine), gold=read_run(gold))


def test_the_distance_from_gold_is_that_of_hand_counts(tmp_path: Path, make_run: MakeRun) -> None:
    found = compared(make_run, gold_file(tmp_path / "gold.jsonl", GOLD))
    margin = found.measures["gold_margin"]
    assert margin.base and margin.run and found.gold
    assert margin.run.value == pytest.approx((0.75 + 0.875 + 0.0) / 3)
    assert margin.base.value == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert margin.change.value == pytest.approx((0.25 + 0.875 - 1.0) / 3)
    assert margin.run.low < margin.run.value < margin.run.high and margin.run.n == 3
    flips, orders = found.measures["gold_flips"], found.measures["gold_order_flips"]
    assert flips.base and flips.run and orders.base and orders.run
    assert (flips.base.value, flips.run.value) == (0.0, pytest.approx(1 / 3))
    assert (orders.base.value, orders.run.value) == (0.0, pytest.approx(1 / 6))
    assert (found.gold["base"]["worst"], found.gold["run"]["worst"]) == (2.0, 1.5)
    together = 1.5 * 1 + 1 * 2 + 0.5 * -1 + 0.75 * 0.5 + 9 + 9
    assert found.gold["run"]["slope"] == pytest.approx(together / (1 + 4 + 1 + 0.25 + 9 + 9))


def test_gold_is_a_run_folder_or_rows_of_id_and_margin_too(tmp_path: Path, make_run: MakeRun) -> None:
    both = compared(make_run, run_at(make_run, "gold", GOLD)).measures["gold_margin"].run
    assert both and both.value == pytest.approx((0.75 + 0.875 + 0.0) / 3)
    single = tmp_path / "margins.jsonl"
    single.write_text('{"id": "p0", "margin": 1.5}\n{"id": "p1", "margin": -0.25, "label": "B"}\n')
    runs = [read_run(tmp_path / name) for name in ("base", "mine")]
    found = compare_runs(*runs, gold=read_run(single))
    margin, flips = found.measures["gold_margin"].run, found.measures["gold_flips"].run
    assert margin and flips and (margin.n, flips.value) == (2, 0.5)
    assert margin.value == pytest.approx(((0.0 + 0.5) / 2 + (0.75 + 1.0) / 2) / 2)
    assert "1 judged rows are not in margins" in found.notes[-1]


def test_rows_without_a_verdict_are_left_out(tmp_path: Path, make_run: MakeRun) -> None:
    rows = [judged_row(name, both) for name, both in MINE.items()]
    rows[0] |= {"verdict": None, "p_a": None, "margin": None, "orders": []}
    gold = read_run(gold_file(tmp_path / "gold.jsonl", GOLD))
    base, mine = run_at(make_run, "base", BASE), make_run("mine", rows)
    margin = compare_runs(read_run(base), read_run(mine), gold=gold).measures["gold_margin"].run
    assert margin and margin.n == 2 and margin.value == pytest.approx(0.875 / 2)


def test_gold_of_other_pairs_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(InputError, match="of other pairs"):
        compared(make_run, gold_file(tmp_path / "gold.jsonl", {"q": (1.0, 1.0)}))


def test_gold_is_told_in_the_table_and_in_sentences(tmp_path: Path, make_run: MakeRun) -> None:
    found = compared(make_run, gold_file(tmp_path / "gold.jsonl", GOLD))
    said = " ".join(sentences(found))
    assert "From gold: mean |margin − gold| 0.500 nats → 0.542 nats, a change of +0.042 [" in said
    assert "other verdicts 0.0 % → 33.3 %" in said and "off by 2.00 → 1.50 nats" in said
    runs = [read_run(tmp_path / name) for name in ("base", "mine")]
    first, second = summary_table(runs[0], runs[1:], [found]).texts()
    assert first["mean |margin − gold|"].startswith("0.500 [") and second["not as gold %"].startswith("33.3 [")
    without = summary_table(runs[0], runs[1:], [compare_runs(*runs)]).texts()
    assert "not as gold %" not in without[0]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_gates_on_gold(tmp_path: Path, make_run: MakeRun) -> None:
    base, mine = run_at(make_run, "base", BASE), run_at(make_run, "mine", MINE)
    gold = gold_file(tmp_path / "gold.jsonl", GOLD)
    result = invoke(base, mine, "--gold", gold, "--gate", "gold_margin<=5", "--report", tmp_path / "report.html")
    assert result.exception is None, result.exception
    printed = json.loads(result.stdout)
    assert set(GOLD_MEASURES) < set(printed["measures"]) and printed["gold"]["name"] == "gold"
    assert printed["gate"][0]["outcome"] == "pass"
    assert "mean |margin − gold|" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "gold_margin,nats" in (tmp_path / "report.csv").read_text(encoding="utf-8")
    failed = invoke(base, mine, "--gold", gold, "--gate", "gold_margin<=-3")
    assert isinstance(failed.exception, GateError) and "Mean |margin − gold|" in str(failed.exception)
    refused = invoke(base, mine, "--gate", "gold_margin<=5")
    assert isinstance(refused.exception, InputError) and "add --gold" in str(refused.exception)
    assert "gold" not in json.loads(invoke(base, mine).stdout)


def test_a_report_replaces_no_gold(tmp_path: Path, make_run: MakeRun) -> None:
    base, mine = run_at(make_run, "base", BASE), run_at(make_run, "mine", MINE)
    gold = gold_file(tmp_path / "gold.csv", GOLD)
    result = invoke(base, mine, "--gold", gold, "--report", tmp_path / "gold.html")
    assert isinstance(result.exception, InputError) and not (tmp_path / "gold.html").exists()
