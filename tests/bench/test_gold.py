"""Margins against gold: the figures from rows made by hand, and a measurement that is stopped and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gramlite.bench.folder import Run, read_run
from gramlite.bench.quality import assess, choose_pairs, command, read_gold, table_row

from gramlite.errors import InputError, IntegrityError
from gramlite.formats.artifact import Manifest, write_manifest
from gramlite.judging.pair import Pair

from .conftest import judged_row

MakeRun = Callable[..., Path]


def gold_file(path: Path, margins: dict[str, tuple[float, float]], tokens: int = 300) -> Path:
    rows = [
        {"set": "made.jsonl", "id": name, "label": "A", "margin_ab": ab, "margin_ba": ba, "tokens_ab": tokens + place,
         "tokens_ba": tokens - place}
        for place, (name, (ab, ba)) in enumerate(margins.items())
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that only its size and its manifest are read of."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    write_manifest(path, Manifest(format="gguf", name="model", bits_per_weight=4.5))
    return path


def test_figures_of_a_run(tmp_path: Path, make_run: MakeRun, model: Path) -> None:
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", {"p0": (1.0, 2.0), "p1": (-1.0, 0.5), "p2": (3.0, 3.0)}))
    mine = make_run("mine", [judged_row("p0", (1.5, 1.0)), judged_row("p1", (0.5, 0.75)), judged_row("p2", (3, 3))])
    base = make_run("base", [judged_row("p0", (1.0, 1.0)), judged_row("p1", (-1.0, 0.5)), judged_row("p2", (1, 3))])
    pairs = [Pair("q", "a", "b", id=f"p{number}") for number in range(3)]
    found = assess("mine", model, read_run(mine), gold, pairs, read_run(base))
    assert found.error.value == pytest.approx((0.75 + 0.875 + 0.0) / 3)
    assert found.change.value == pytest.approx((0.25 + 0.875 - 1.0) / 3)
    assert found.error.low < found.error.value < found.error.high
    assert found.worst == 1.5
    assert (found.flips, found.order_flips) == (1, 1)
    together = 1.5 * 1 + 1 * 2 + 0.5 * -1 + 0.75 * 0.5 + 9 + 9
    assert found.slope == pytest.approx(together / (1 + 4 + 1 + 0.25 + 9 + 9))
    assert (found.bytes, found.bits_per_weight) == (1000, 4.5)
    row = table_row(found, is_first=False)
    assert row["flips"] == "1 of 3"
    assert row["less the first's"].startswith("+0.042 (")
    assert table_row(found, is_first=True)["less the first's"] == ""


def test_pairs_are_the_first_that_fit(tmp_path: Path) -> None:
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", {f"p{number}": (1.0, 1.0) for number in range(6)}))
    pairs = [Pair("q", "a", "b", id=f"p{number}") for number in (5, 9, 0, 3, 1)]  # of p9 there is no gold
    assert [pair.id for pair in choose_pairs(pairs, gold, rows=3, longest=None)] == ["p5", "p0", "p3"]
    assert [pair.id for pair in choose_pairs(pairs, gold, rows=2, longest=302)] == ["p0", "p1"]
    with pytest.raises(InputError, match="Only 2 pairs"):
        choose_pairs(pairs, gold, rows=3, longest=302)


def judged(*arguments: object) -> list[dict[str, Any]]:
    result = CliRunner().invoke(command, [*map(str, arguments), "--json"], catch_exceptions=False)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_measurement_goes_on_where_it_stopped(scripted: Path, tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(12)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(
        json.dumps({"id": name, "prompt": f"q{name}", "response_a": "a", "response_b": "b"}) + "\n" for name in names
    ))  # fmt: skip
    gold = gold_file(tmp_path / "gold.jsonl", {name: (1.0, 1.0) for name in names})
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(json.loads(scripted.read_text()) | {"name": "slow", "seconds": 0.05}))
    for path in (scripted, slow):
        write_manifest(path, Manifest(format="scripted", name=path.stem, bits_per_weight=8.0))
    shared = ("--pairs", f"pairs:{pairs}", "--gold", gold, "-o", tmp_path / "runs")
    part = CliRunner().invoke(
        command, [str(slow), *map(str, shared), "--rows", "12", "--seconds", "0.3"], catch_exceptions=False
    )
    assert "the same command goes on" in part.stderr
    count = len(read_run(tmp_path / "runs/slow").rows)
    assert 0 < count < 12
    assert f"of {count} |" in part.stdout
    first, second = judged(slow, scripted, *shared, "--rows", 12)
    assert len(read_run(tmp_path / "runs/slow").rows) == 12
    assert first["error"]["n"] == second["error"]["n"] == 12
    assert first["error"] == second["error"]  # the same script
    assert second["change"]["value"] == 0
    again = judged(slow, scripted, *shared, "--rows", 12, "--seconds", 0)
    assert again == [first, second]
    slow.write_text(json.dumps(json.loads(slow.read_text()) | {"rationale": "changed"}))
    with pytest.raises(IntegrityError, match="sha256"):
        judged(slow, *shared, "--rows", 12)


def test_refusals(scripted: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    other.mkdir()
    (other / scripted.name).write_bytes(scripted.read_bytes())
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"id": "p0", "prompt": "q", "response_a": "a", "response_b": "b"}))
    gold = gold_file(tmp_path / "gold.jsonl", {"p0": (1.0, 1.0)})
    shared = ("--pairs", f"pairs:{tmp_path / 'pairs.jsonl'}", "--gold", gold, "-o", tmp_path / "runs", "--rows", 1)
    with pytest.raises(InputError, match="called 'scripted'"):
        judged(scripted, other / scripted.name, *shared)
    with pytest.raises(InputError, match="before the first pair"):
        judged(scripted, *shared, "--seconds", -1)


def test_gold_keeps_its_prompts_lengths(tmp_path: Path) -> None:
    gold: Run = read_gold(gold_file(tmp_path / "gold.jsonl", {"p0": (1.0, -2.0), "p1": (0.5, 0.5)}))
    assert gold.rows["p1"]["prompt_tokens"] == (301, 299)
    assert [order["margin"] for order in gold.rows["p0"]["orders"]] == [1.0, -2.0]
