"""Comparing runs: counted against hand counts, against gold, and from the command line."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gramlite.bench.compare import command
from gramlite.bench.comparison import compare_runs
from gramlite.bench.folder import Run, gold_row, read_run
from gramlite.bench.gate import evaluate, parse_gate
from gramlite.bench.measures import MEASURES
from gramlite.bench.statistics import Estimate, clopper_pearson, mcnemar_exact, rate_interval
from gramlite.bench.summary import figures_table, markdown, need_sentence, sentences

from gramlite.errors import GateError, InputError

from .conftest import MakeRun, Row, judged_row

GOLD = Path(__file__).resolve().parents[2] / "../shared/reference-judge/direct_fp32.jsonl.gz"
needs_gold = pytest.mark.skipif(not GOLD.is_file(), reason="../shared/reference-judge is not there")


def side(verdict: str | None, *, prompt: str | None = None, identifier: str = "", **more: Any) -> Row:
    if verdict is None:
        row = judged_row(identifier, [1.0, 1.0])
        row |= {"verdict": None, "p_a": None, "margin": None, "consistent": None, "orders": [], "reason": "no answer"}
    else:
        row = judged_row(identifier, [1.0, 2.0] if verdict == "A" else [-1.0, -2.0])
        row["verdict"] = verdict
    return row | more | ({"meta": {"subset": "s", "prompt_sha": prompt}} if prompt else {})


def two_runs(make_run: MakeRun, table: Sequence[tuple[str | None, str | None, str | None]]) -> tuple[Path, Path]:
    """Folders of two runs from (label, base verdict, run verdict)."""
    first = [side(base, identifier=str(i), label=label) for i, (label, base, _) in enumerate(table)]
    second = [side(run, identifier=str(i), label=label) for i, (label, _, run) in enumerate(table)]
    return make_run("base", first), make_run("small", second)


def test_counts_and_rates_against_hand_counts(make_run: MakeRun) -> None:
    table: list[tuple[str | None, str | None, str | None]] = (
        [("A", "A", "A")] * 50 + [("B", "B", "A")] * 8 + [("A", "B", "A")] * 3 + [("B", "A", "A")] * 10
        + [("tie", "A", "B")] * 4 + [("tie", "A", "A")] * 6 + [(None, "B", "A")] * 2
        + [("A", "A", None)] * 5 + [("A", None, "A")] * 2 + [("B", None, None)]
    )  # fmt: skip
    base, run = two_runs(make_run, table)
    found = compare_runs(read_run(base), read_run(run))
    assert found.counts == {
        "common": 91, "base_only": 0, "run_only": 0, "base_no_verdict": 3, "run_no_verdict": 6, "judged": 83,
        "labelled": 71, "labelled_tie": 10, "prompts": 83,
    }  # fmt: skip
    assert found.table == {"both": 50, "lost": 8, "gained": 3, "neither": 10}
    assert found.p == mcnemar_exact(8, 3)
    values = {name: measure.change.value for name, measure in found.measures.items()}
    assert values["accuracy"] == pytest.approx(-5 / 71)
    assert values["flips"] == pytest.approx(17 / 83)
    assert values["lost"] == pytest.approx(8 / 71)
    assert values["agreement"] == pytest.approx(66 / 83)
    assert values["no_verdict"] == pytest.approx(3 / 91)
    assert values["margin"] == pytest.approx(17 * 3 / 83)  # a flipped row moves by 2 and by 4 nats
    flips = found.measures["flips"].change
    assert (flips.low, flips.high) == pytest.approx(clopper_pearson(17, 83))
    assert found.measures["accuracy"].base is not None
    assert found.measures["accuracy"].base.value == pytest.approx(58 / 71)
    assert any("3 rows of base, 6 of small" in note for note in found.notes)
    assert tuple(found.measures) == MEASURES


def test_rows_of_only_one_run_are_left_out_and_counted(make_run: MakeRun) -> None:
    base = make_run("base", [side("A", identifier=str(i), label="A") for i in range(10)])
    run = make_run("run", [side("B", identifier=str(i), label="A") for i in range(7, 12)])
    found = compare_runs(read_run(base), read_run(run))
    assert (found.counts["common"], found.counts["base_only"], found.counts["run_only"]) == (3, 7, 2)
    assert found.measures["flips"].change.value == 1.0
    assert "7 rows are only in base and 2 only in run" in found.notes[0]


def test_position_consistency_and_cut_off_thinking(make_run: MakeRun) -> None:
    def rows(margins: list[float], cut: bool, tokens: int) -> list[Row]:
        made = [judged_row(str(i), margins, label="A") for i in range(40)]
        for row in made[:10]:
            row["orders"][0]["forced"] = cut
        for row in made:
            for order in row["orders"]:
                order["tokens"]["generated"] = tokens
        return made

    base = make_run("base", rows([2.0, 1.0], False, 80))
    run = make_run("run", rows([2.0, -1.0], True, 120))  # prefers whatever stands first
    measures = compare_runs(read_run(base), read_run(run)).measures
    assert measures["consistency"].change.value == -1.0
    first = measures["first_position"]
    assert first.base and first.run
    assert (first.base.value, first.run.value) == (0.5, 1.0)
    assert measures["rationale"].change.value == 40
    assert measures["rationale"].unit == "tokens"
    assert measures["forced"].change.value == 0.25
    assert measures["divergence"].change.value > 0.1


def test_direct_mode_has_no_rationale_to_measure(make_run: MakeRun) -> None:
    rows = [judged_row(str(i), [1.0, 1.0]) for i in range(5)]
    for row in rows:
        for order in row["orders"]:
            order["rationale"] = None
    found = compare_runs(read_run(make_run("base", rows)), read_run(make_run("run", rows)))
    assert found.measures["rationale"].change.n == found.measures["forced"].change.n == 0
    assert math.isnan(found.measures["accuracy"].change.value)  # nothing is labelled
    assert "nothing is said of accuracy" in " ".join(sentences(found))


def test_a_label_that_differs_is_refused(make_run: MakeRun) -> None:
    base = make_run("base", [side("A", identifier="x", label="A")])
    run = make_run("run", [side("A", identifier="x", label="B")])
    with pytest.raises(InputError, match="runs of different data"):
        compare_runs(read_run(base), read_run(run))
    other = make_run("other", [side("A", identifier="y", label="A")])
    with pytest.raises(InputError, match="no row in common"):
        compare_runs(read_run(base), read_run(other))


def test_subsets_are_corrected_with_holm(make_run: MakeRun) -> None:
    def rows(worse: bool) -> list[Row]:
        made = []
        for i in range(120):
            subset = ["chat", "code", "math"][i % 3]
            wrong = worse and subset == "code" and i % 2 == 0
            made.append(side("B" if wrong else "A", identifier=str(i), label="A", meta={"subset": subset}))
        return made

    found = compare_runs(read_run(make_run("base", rows(False))), read_run(make_run("run", rows(True))))
    by_name = {subset.name: subset for subset in found.subsets}
    assert list(by_name) == ["chat", "code", "math"]
    assert by_name["code"].accuracy.value == -0.5
    assert by_name["code"].p == mcnemar_exact(20, 0)
    assert by_name["code"].p_holm == pytest.approx(min(1.0, 3 * by_name["code"].p))
    assert by_name["chat"].p_holm == 1.0


def test_rows_that_share_a_prompt_count_for_less(make_run: MakeRun) -> None:
    def rows(flip: bool) -> list[Row]:
        made = []
        for i in range(300):
            prompt = i // 6
            wrong = flip and prompt % 10 == 0
            made.append(side("B" if wrong else "A", identifier=str(i), label="A", prompt=f"p{prompt}"))
        return made

    base, run = read_run(make_run("base", rows(False))), read_run(make_run("run", rows(True)))
    clustered, single = compare_runs(base, run), compare_runs(base, run, cluster=False)
    assert clustered.counts["prompts"] == 50
    assert clustered.design_effect == pytest.approx(6, rel=0.15)
    for name in ("accuracy", "flips"):
        wide, narrow = clustered.measures[name].change, single.measures[name].change
        assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert clustered.detectable and single.detectable and clustered.detectable > single.detectable
    assert any("share 50 prompts" in note for note in clustered.notes)


def test_settings_that_differ_are_noted(make_run: MakeRun) -> None:
    rows = [side("A", identifier=str(i), label="A") for i in range(3)]
    base = make_run("base", rows, settings={"mode": "direct"}, suite={"sha256": "a"})
    run = make_run("run", rows, settings={"mode": "think"}, suite={"sha256": "b"})
    notes = compare_runs(read_run(base), read_run(run)).notes
    assert any("mode is direct in base and think in run" in note for note in notes)
    assert any("different suite files" in note for note in notes)


def test_texts_that_differ_are_noted(make_run: MakeRun) -> None:
    rows = [side("A", identifier=str(i), label="A", input=f"digest {i}") for i in range(3)]
    changed = [*rows[:2], {**rows[2], "input": "another"}]
    base, run = make_run("base", rows, suite={}), make_run("run", changed, suite={})
    notes = compare_runs(read_run(base), read_run(run)).notes
    assert notes == ["1 common rows were judged from other texts in run than in base."]


def test_a_torn_last_line_and_a_row_judged_twice(make_run: MakeRun) -> None:
    folder = make_run("base", [side(None, identifier="x"), side("A", identifier="x", label="A")])
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"id": "y", "verd')
    rows = read_run(folder).rows
    assert list(rows) == ["x"] and rows["x"]["verdict"] == "A"


@pytest.mark.parametrize("content", ["", '{"prompt": "no row"}\n'])
def test_what_is_no_run_is_refused(make_run: MakeRun, tmp_path: Path, content: str) -> None:
    folder = make_run("empty", [])
    (folder / "rows.jsonl").write_text(content)
    with pytest.raises(InputError, match="no rows|no judged row"):
        read_run(folder)
    with pytest.raises(InputError, match="no run at"):
        read_run(tmp_path / "absent")


def test_no_significance_is_claimed_without_power(make_run: MakeRun) -> None:
    base, run = two_runs(make_run, [("A", "A", "A")] * 19 + [("A", "A", "B")])
    found = compare_runs(read_run(base), read_run(run))
    said = " ".join(sentences(found))
    assert "No significant difference, which is no proof of none" in said
    assert found.detectable is not None and found.detectable > 0.2
    few, fewer = compare_runs(read_run(base), read_run(run)), found.pairs_needed(0.01)
    assert fewer is not None and fewer > 500
    assert f"about {fewer:,} labelled pairs" in need_sentence(few, 1.0)
    assert found.pairs_needed(0.30) == pytest.approx(30, abs=15)


# --- gold ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gold() -> list[Row]:
    with gzip.open(GOLD, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@needs_gold
def test_gold_is_a_run(gold: list[Row], make_run: MakeRun) -> None:
    run = read_run(GOLD)
    assert len(run.rows) == len(gold) == 8885
    autoj = [row for row in run.rows.values() if row["meta"]["subset"] == "autoj" and row["label"] in ("A", "B")]
    assert np.mean([row["verdict"] == row["label"] for row in autoj]) == pytest.approx(0.661, abs=0.002)
    row = gold_row({"id": "x", "set": "hhh.jsonl", "label": "A", "margin_ab": 4.0, "margin_ba": -1.0})
    assert row["p_a"] == pytest.approx((1 / (1 + math.exp(-4)) + 1 / (1 + math.exp(1))) / 2)
    assert (row["verdict"], row["consistent"]) == ("A", False)
    same = compare_runs(run, run)
    assert same.measures["flips"].change.value == same.measures["margin"].change.value == 0


@needs_gold
def test_five_percent_flips_are_found_and_fail_the_gate(gold: list[Row]) -> None:
    """A random 5 % of gold's signs turned, a hundred times: found inside the interval, and the gate fails."""
    base = read_run(GOLD)
    turned_rows = [gold_row({**row, "margin_ab": -row["margin_ab"], "margin_ba": -row["margin_ba"]}) for row in gold]
    clauses = parse_gate("flips<=3")
    inside = failed = 0
    for seed in range(100):
        turned = np.random.default_rng(seed).choice(len(gold), size=round(0.05 * len(gold)), replace=False)
        rows = {**base.rows, **{turned_rows[i]["id"]: turned_rows[i] for i in turned}}
        if seed % 25 == 0:
            found = compare_runs(base, replace(base, name="turned", rows=rows))
            flips = found.measures["flips"].change
            assert flips == flips_of(base, rows)
            assert found.table["lost"] + found.table["gained"] > 300
        else:  # the whole comparison costs seconds, the flips alone milliseconds
            flips = flips_of(base, rows)
            found = replace(found, measures={**found.measures, "flips": replace(found.measures["flips"], change=flips)})
        inside += flips.low <= 0.05 <= flips.high
        failed += evaluate(found, clauses)[0].outcome == "fail"
    assert inside >= 94
    assert failed == 100


def flips_of(base: Run, rows: Mapping[str, Row]) -> Estimate:
    return rate_interval([row["verdict"] != rows[identifier]["verdict"] for identifier, row in base.rows.items()])


@needs_gold
def test_flips_that_are_drawn_one_by_one_are_covered_in_95_of_100_cases(gold: list[Row]) -> None:
    counts = np.random.default_rng(0).binomial(len(gold), 0.05, size=4000)
    bounds = [clopper_pearson(int(count), len(gold)) for count in counts]
    assert np.mean([low <= 0.05 <= high for low, high in bounds]) == pytest.approx(0.955, abs=0.01)


@needs_gold
def test_margin_error_against_gold(gold: list[Row], make_run: MakeRun) -> None:
    generator = np.random.default_rng(1)
    records = [record for record in gold if record["set"] == "autoj.jsonl"][:300]
    noise = generator.normal(0, 0.5, size=(300, 2))
    rows = [
        judged_row(record["id"], [record["margin_ab"] + noise[i, 0], record["margin_ba"] + noise[i, 1]])
        for i, record in enumerate(records)
    ]
    found = compare_runs(read_run(GOLD), read_run(make_run("noisy", rows)))
    assert found.counts["common"] == 300 and found.counts["labelled"] > 200  # gold brings the labels
    assert found.measures["margin"].change.value == pytest.approx(np.abs(noise).mean(), abs=1e-9)


# --- command line --------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def test_one_json_object_a_line(make_run: MakeRun) -> None:
    base, run = two_runs(make_run, [("A", "A", "A")] * 90 + [("A", "A", "B")] * 10)
    result = invoke(base, run, run, "--need", "1", "--gate", "flips<=50")
    assert result.exit_code == 0, result.exception
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["run"] for line in lines] == ["small", "small (2)"]
    assert lines[0]["measures"]["flips"]["change"]["value"] == pytest.approx(0.1)
    assert lines[0]["pairs_needed"]["1"] > 100
    assert lines[0]["gate"][0]["outcome"] == "pass"
    assert {"seed", "confidence", "resamples"} <= lines[0].keys()
    again = invoke(base, run, run, "--need", "1", "--gate", "flips<=50")
    assert again.stdout == result.stdout


def test_the_gate_ends_the_command(make_run: MakeRun, tmp_path: Path) -> None:
    base, run = two_runs(make_run, [("A", "A", "A")] * 450 + [("A", "A", "B")] * 50)
    junit = tmp_path / "gate.xml"
    result = invoke(base, run, "--gate", "accuracy>=-1.0,flips<=3", "--junit", junit, "--github")
    assert isinstance(result.exception, GateError) and result.exception.exit_code == 7
    assert str(result.exception).count("fail for small") == 2
    assert junit.is_file() and json.loads(result.stdout)["gate"][1]["outcome"] == "fail"
    assert "::error title=gramlite gate%3A flips<=3::" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--need", "0"], ["--gate", "speed>=1"], ["--github"], ["--junit", "x.xml"], ["--gate", "flips<3"]]
)
def test_options_that_make_no_sense(make_run: MakeRun, arguments: list[str]) -> None:
    base, run = two_runs(make_run, [("A", "A", "A")] * 5)
    assert isinstance(invoke(base, run, *arguments).exception, InputError)


def test_people_get_tables(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    from gramlite.bench.compare import show

    base, run = two_runs(make_run, [("A", "A", "A")] * 90 + [("A", "A", "B")] * 10)
    runs = [read_run(path) for path in (base, run)]
    show(runs[0], [runs[1]], [compare_runs(*runs)])
    printed = capsys.readouterr().out
    assert "Compared with base" in printed and "10 from right to wrong" in printed


def test_markdown_and_csv(make_run: MakeRun) -> None:
    rows = [side("AB"[i % 2], identifier=str(i), label="A", meta={"subset": ["a|b", "c"][i % 2]}) for i in range(40)]
    base = read_run(make_run("base", rows))
    found = compare_runs(base, base)
    found = type(found)(**{**found.__dict__, "run": "=evil|run"})
    text = markdown(base, [base], [found])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table[:4]}) == 1
    assert "a\\|b" in text
    lines = figures_table([found]).csv().splitlines()
    assert lines[0].startswith("base_run,run,subset,measure")
    assert len(lines) == 1 + len(MEASURES) + 2 * 2
    assert all(line.split(",")[1] == "'=evil|run" for line in lines[1:])
