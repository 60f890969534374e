"""A sweep's tables, sentences and page, from runs whose figures are known."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gramlite.bench.folder import Run
from gramlite.bench.sweep_page import write_page
from gramlite.bench.sweep_result import POOLED, SweepEntry, SweepResult, compare_all
from gramlite.bench.sweep_table import csv_results, json_rows, suite_table, tables_markdown
from gramlite.bench.sweep_words import what_it_says
from gramlite.bench.variants import SweepSource, parse_variant
from gramlite.bench.work import load_work

from .conftest import judged_row
from .test_run import write_pairs


def run_of(name: str, noise: float, *, seed: int, count: int = 200, lift: float = 0.0) -> Run:
    """A run whose margins are those of the others of the same seed plus `noise` nats, alternating in sign, on both orders."""
    truth = np.random.default_rng(seed).normal(0, 1.5, size=count)
    rows = {}
    for i, margin in enumerate(truth):
        moved = float(margin) + noise * (-1) ** i - lift
        label = "A" if margin > 0 else "B"
        rows[f"p{i}"] = judged_row(f"p{i}", [moved, moved], label=label, verdict="A" if moved > 0 else "B")
    record = {"model": {"bytes": 1}, "versions": {"gramlite": "0.1.0"}, "hardware": {"cpu": "a | processor"}}
    return Run(name, Path("somewhere") / name, rows, record)


NOISE = {"F16": 0.0, "Q8_0": 0.1, "Q4_0": 0.9, "gptq:4x64": 0.5}
SIZES = {"F16": 270_000_000, "Q8_0": 145_000_000, "Q4_0": 90_000_000, "gptq:4x64": 95_000_000}


def swept_of(suites: dict[str, int], *, lift: float = 0.0) -> SweepResult:
    entries = [
        SweepEntry(
            name, SIZES[name], 16.0,
            {suite: run_of(name, noise, seed=seed, lift=lift * noise) for suite, seed in suites.items()},
        )
        for name, noise in NOISE.items()
    ]  # fmt: skip
    broken = SweepEntry("Q2_K", failure="rows are | too *short*")
    return compare_all([*entries, broken], seed=0)


@pytest.fixture(scope="module")
def swept() -> SweepResult:
    return swept_of({"autoj": 1, "pandalm": 2})


def test_margin_error_is_what_was_put_in(swept: SweepResult) -> None:
    rows = {(row["suite"], row["type"]): row for row in json_rows(swept, [])}
    assert len(rows) == 3 * 5
    for suite, n in (("autoj", 200), ("pandalm", 200), (POOLED, 400)):
        for name in ("Q8_0", "Q4_0", "gptq:4x64"):
            error = rows[suite, name]["margin_error"]
            assert error["value"] == pytest.approx(NOISE[name]) and error["n"] == n
            assert error["low"] <= NOISE[name] + 1e-9 and error["high"] >= NOISE[name] - 1e-9
            flips, agreement = rows[suite, name]["flips"], rows[suite, name]["agreement"]
            assert flips["value"] == pytest.approx(1 - agreement["value"])
    assert rows["autoj", "F16"]["accuracy"]["value"] == 1.0 and rows["autoj", "F16"]["flips"] is None
    assert rows["autoj", "Q2_K"]["failure"] and rows["autoj", "Q2_K"]["pairs"] == 0
    lost = 1 - rows["autoj", "Q4_0"]["accuracy"]["value"]  # every flip is one from right to wrong here
    assert lost == pytest.approx(rows["autoj", "Q4_0"]["flips"]["value"]) and lost > 0.1


def test_pooling_keeps_the_suites_apart_as_subsets(swept: SweepResult) -> None:
    comparison = swept.comparisons[POOLED]["Q4_0"]
    assert [subset.name for subset in comparison.subsets] == ["autoj", "pandalm"]
    for subset in comparison.subsets:
        alone = swept.comparisons[subset.name]["Q4_0"]
        assert subset.flips.value == alone.measures["flips"].change.value and subset.p == alone.p


def test_a_type_without_every_suite_is_not_pooled(swept: SweepResult) -> None:
    cut = [replace(e, runs={"autoj": e.runs["autoj"]}) if e.name == "Q4_0" else e for e in swept.entries]
    found = compare_all(cut, seed=0)
    assert set(found.comparisons[POOLED]) == {"Q8_0", "gptq:4x64"}
    assert set(found.comparisons["autoj"]) == {"Q8_0", "Q4_0", "gptq:4x64"}
    row = next(row for row in suite_table(found, "pandalm").texts() if row["type"] == "Q4_0")
    assert row["flips %"] == "–" and row["s/pair"] == "–"


def test_the_table_for_people(swept: SweepResult) -> None:
    rows = {row["type"]: row for row in suite_table(swept, "autoj").texts()}
    assert rows["F16"]["Δ accuracy"] == "base" and rows["F16"]["size MB"] == "270.0"
    assert rows["Q8_0"]["mean |Δ margin|"] == "0.100 [0.100, 0.100]"
    assert rows["Q2_K"]["failed"] == "rows are | too *short*" and rows["Q2_K"]["accuracy %"] == "–"
    lines = tables_markdown(swept)
    assert [line for line in lines if line.startswith("## ")] == [
        f"## {suite}, {n} pairs, {n} of them labelled A or B"
        for suite, n in (("all suites", 400), ("autoj", 200), ("pandalm", 200))
    ]  # fmt: skip
    table = [line for line in lines if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1  # no cell breaks its row


def test_nothing_is_rounded_in_csv(swept: SweepResult) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_results(swept))))
    row = next(row for row in rows if (row["suite"], row["type"]) == ("autoj", "Q4_0"))
    figures = swept.comparisons["autoj"]["Q4_0"].measures
    assert float(row["flips"]) == figures["flips"].change.value
    assert float(row["accuracy_change_low"]) == figures["accuracy"].change.low
    assert int(row["margin_error_n"]) == 200


def test_what_it_says_is_what_was_measured(swept: SweepResult) -> None:
    said = " ".join(what_it_says(swept))
    assert "from best to worst: Q8_0 0.100 < gptq:4x64 0.500 < Q4_0 0.900." in said
    assert "overlap" not in said
    front = next(line for line in what_it_says(swept) if line.startswith("No file of the same size"))
    assert "Q8_0 (145.0 MB" in front and "Q4_0 (90.0 MB" in front and "gptq:4x64 (95.0 MB" in front
    assert "Q2_K could not be measured: rows are | too *short*" in said
    assert "differs significantly from F16's" in said and "Q4_0 (-" in said  # every flip loses here


def test_no_difference_is_claimed_where_none_was_found() -> None:
    entries = [SweepEntry("F16", 2, 16.0, {"autoj": run_of("F16", 0, seed=1)})]
    entries += [SweepEntry(name, 1, 8.0, {"autoj": run_of(name, 0.01, seed=1)}) for name in ("Q8_0", "Q6_K")]
    said = " ".join(what_it_says(compare_all(entries, seed=0)))
    assert "No type's accuracy differs significantly" in said and "no proof of equality" in said
    assert "Intervals of these neighbours overlap: Q8_0 and Q6_K" in said


def test_the_page(swept: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["gramlite", "bench", "sweep", "my judge", "--types", "F16,Q8_0"])
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/config.json").write_text("{}")
    pairs = write_pairs(tmp_path / "pairs.jsonl", 30)
    plan: Any = SimpleNamespace(
        source=SweepSource(checkpoint=tmp_path / "judge", calibration=pairs),
        variants=[parse_variant("F16"), parse_variant("gptq:4x64"), replace(parse_variant("Q4_0"), path=pairs)],
        options=SimpleNamespace(mode="direct", orders="both"),
        works={"autoj": load_work(f"pairs:{pairs}", sample=10, longest=90)},
    )
    write_page(tmp_path / "results.md", plan, swept)
    text = (tmp_path / "results.md").read_text()
    assert "gramlite bench sweep 'my judge' --types F16,Q8_0" in text
    assert (
        "- Machine: cpu a \\| processor." in text
        and "autoj: 10 pairs (drawn by a hash of their ids, of those of at most 90 characters)" in text
    )
    assert "(results.svg)" in text and (tmp_path / "results.svg").is_file() and not (tmp_path / "results.png").exists()
    assert "- Q4\\_0: a model that was there already, sha256" in text and "- Calibration: at most 65,536 tokens" in text
    assert text.count("\n## ") == 5
