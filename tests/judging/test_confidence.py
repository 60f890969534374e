from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import read_jsonl
from fakes import calibration_for, generation
from judging.test_judge import Recording
from ranking.test_rank import Strengths, judge_on
from scipy import stats

import gramlite
from gramlite import InputError, ModelError, Pair, Settings
from gramlite.backends.scripted import ScriptedBackend
from gramlite.cli import run
from gramlite.formats.sidecar import sidecar_path
from gramlite.generation.decoder import Generation, softmax_first
from gramlite.generation.request import Request
from gramlite.judging.budget import choose, measure
from gramlite.judging.confidence import (
    Labelled,
    assess,
    calibrate,
    expected_calibration_error,
    fit,
    held_out,
    labelled,
    probabilities,
    stored_calibration,
)
from gramlite.judging.judge import Judge


def overconfident(count: int, *, temperature: float, bias: float, seed: int = 0, ties: float = 0.0) -> Labelled:
    """Pairs whose true log-odds are known, and a judge that multiplies them and leans to the first."""
    random = np.random.default_rng(seed)
    truth = random.normal(0, 1.5, count)
    outcomes = (random.random(count) < 1 / (1 + np.exp(-truth))).astype(float)
    outcomes[random.random(count) < ties] = 0.5
    return Labelled(truth * temperature + bias, truth * temperature - bias, outcomes, np.arange(count))


def test_the_fit_finds_the_temperature_and_the_bias() -> None:
    temperature, bias = fit(overconfident(20_000, temperature=3.0, bias=0.8))
    assert temperature == pytest.approx(3.0, rel=0.05) and bias == pytest.approx(0.8, abs=0.1)
    temperature, bias = fit(overconfident(20_000, temperature=0.5, bias=-0.2))
    assert temperature == pytest.approx(0.5, rel=0.05) and bias == pytest.approx(-0.2, abs=0.03)


def test_the_fit_is_the_likelihoods_maximum() -> None:
    from scipy.optimize import minimize

    data = overconfident(400, temperature=2.0, bias=0.5, ties=0.2)

    def loss(parameters: np.ndarray) -> float:
        slope, bias = parameters
        odds = np.concatenate([(data.ab - bias) * slope, (-data.ba - bias) * slope])
        won = np.concatenate([data.outcomes, 1 - data.outcomes])
        return float(np.sum(np.logaddexp(0, odds) - won * odds))

    found = minimize(loss, [1.0, 0.0], method="BFGS", options={"gtol": 1e-9})
    temperature, bias = fit(data)
    assert temperature == pytest.approx(1 / found.x[0], rel=1e-4) and bias == pytest.approx(found.x[1], abs=1e-4)


def test_the_fit_stays_finite() -> None:
    margins = np.linspace(-3, 3, 40)
    perfect = Labelled(margins, margins, (margins > 0).astype(float), np.arange(40))
    assert fit(perfect)[0] == pytest.approx(0.05)
    contrary = Labelled(margins, margins, (margins < 0).astype(float), np.arange(40))
    assert fit(contrary)[0] == pytest.approx(100), "no temperature turns a verdict around"
    one_order = Labelled(margins, np.full(40, np.nan), np.arange(40) % 2 * 1.0, np.arange(40))
    assert np.isfinite(fit(one_order)).all() and np.isfinite(probabilities(one_order)).all()
    with pytest.raises(InputError, match="at least 20"):
        fit(perfect.take(range(19)))


def test_the_calibration_error_by_hand() -> None:
    p_a = np.array([0.95, 0.96, 0.2, 0.55])
    outcomes = np.array([1.0, 0.0, 0.0, 0.5])
    bins = [abs((0.95 - 1) + (0.96 - 0)), abs(0.8 - 1), abs(0.55 - 0.5)]
    assert expected_calibration_error(p_a, outcomes) == pytest.approx(sum(bins) / 4)
    assert expected_calibration_error(1 - p_a, 1 - outcomes) == pytest.approx(sum(bins) / 4), "sides do not matter"
    truth = overconfident(50_000, temperature=1.0, bias=0.0)
    assert expected_calibration_error(probabilities(truth), truth.outcomes) < 0.01


def test_held_out_rows_are_not_fitted_to() -> None:
    data = overconfident(100, temperature=3.0, bias=0.0)
    data = replace(data, groups=np.repeat(np.arange(20), 5))
    p_a = held_out(data)
    for row in (0, 50):
        changed = data.outcomes.copy()
        members = data.groups == data.groups[row]
        changed[members] = 1 - changed[members]
        again = held_out(replace(data, outcomes=changed))
        assert again[members] == pytest.approx(p_a[members]), "a prompt's own labels have no say in its probabilities"
        assert not np.allclose(again, p_a)


@pytest.fixture(scope="module")
def auto_j(shared: Path, gold: dict[str, dict[str, Any]]) -> Callable[[bool], Labelled]:
    rows = list(read_jsonl(shared / "benchmarks/autoj.jsonl.gz"))

    def collect(ties: bool) -> Labelled:
        verdicts = (
            (
                {"orders": [{"order": o, "margin": gold[row["id"]][f"margin_{o}"]} for o in ("ab", "ba")]},
                row["label"],
                row["prompt"],
            )
            for row in rows
        )
        return labelled(verdicts, ties=ties)

    return collect


@pytest.mark.parametrize("ties", [True, False])
def test_the_error_falls_on_held_out_auto_j(auto_j: Callable[[bool], Labelled], ties: bool) -> None:
    data = auto_j(ties)
    prompts = np.random.default_rng(0).permutation(np.unique(data.groups))
    fitted = np.isin(data.groups, prompts[: len(prompts) // 2])
    first, second = data.take(np.flatnonzero(fitted)), data.take(np.flatnonzero(~fitted))
    report = assess(second, probabilities(second), probabilities(second, *fit(first)))
    value, low, high = report["fall"]
    assert value >= 0.4 and 0 < low <= value <= high, report
    assert report["accuracy_after"] == pytest.approx(report["accuracy_before"], abs=0.01)
    assert calibrate(data, {}, {}).report["fall"][0] >= 0.4


def test_a_calibrated_judge_rescales_each_order() -> None:
    plain = judge_on(Recording([3.0, 1.0]))
    judge = plain.calibrated(calibration_for(plain))
    verdict = judge(prompt="q", response_a="x", response_b="y")
    first, second = verdict.orders
    assert (first.margin, second.margin) == (1.25, -0.25), "(3 - 0.5) / 2, and -(1 - 0.5) / 2"
    assert verdict.p_a == pytest.approx((softmax_first(1.25) + softmax_first(-0.25)) / 2, abs=1e-6)
    assert first.votes == {"A": 1, "B": 0} and judge.settings_hash != plain.settings_hash


def test_a_calibration_stays_with_what_it_was_fitted_to() -> None:
    plain = judge_on(Recording())
    judge = plain.calibrated(calibration_for(plain))
    assert judge.with_settings(orders="ab").calibration and judge.with_settings(seed=3).calibration
    assert judge.with_settings(delimiters="flag").calibration is None
    assert judge.with_settings().settings_hash == judge.settings_hash
    other = Judge(plain.backend, plain.template, plain.scaffold, plain.settings, {"sha256": "another"})
    with pytest.raises(InputError, match="another model or other settings"):
        other.calibrated(judge.calibration)  # type: ignore[arg-type]


def test_one_order_needs_labels_of_either_side(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    margins = np.random.default_rng(0).normal(0, 2, 60)
    none = np.full(60, np.nan)
    for outcomes in (np.ones(60), np.zeros(60), (np.arange(60) > 2).astype(float)):
        one_order = Labelled(margins, none, outcomes, np.arange(60))
        with pytest.raises(InputError, match="--orders both, or shuffle"):
            calibrate(one_order, {}, {})
        assert abs(calibrate(replace(one_order, ba=margins), {}, {}).bias) < 5, "both orders tell a lean from a label"
    assert calibrate(Labelled(margins, none, np.arange(60) % 2.0, np.arange(60)), {}, {}).temperature > 0

    pairs, rows = tmp_path / "chosen.jsonl", tmp_path / "rows.jsonl"
    chosen = [{"prompt": f"q{n}", "chosen": "x", "rejected": "y"} for n in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    command = ["calibrate", str(pairs), "-m", str(scripted), "--mode", "direct", "-o", str(rows)]
    assert run([*command, "--orders", "ab"]) == 2 and not rows.exists(), "refused before anything is judged"
    assert "--orders both, or shuffle" in capsys.readouterr().err
    assert run(command) == 0


def test_pairs_of_few_prompts_are_held_out_one_by_one() -> None:
    data = replace(overconfident(100, temperature=3.0, bias=0.0), groups=np.zeros(100, dtype=np.int64))
    calibration = calibrate(data, {}, {})
    assert calibration.report["prompts"] == 1 and calibration.report["resampled"] == "pairs"
    value, low, high = calibration.report["error_before"]
    assert low < value < high, "an interval from more than one sample"
    alone = replace(data, groups=np.arange(100))
    assert (
        held_out(data) == pytest.approx(held_out(alone)) and calibrate(alone, {}, {}).report["resampled"] == "prompts"
    )


def pairs_file(path: Path, count: int) -> Path:
    rows = [{"prompt": f"q{n}", "response_a": "x", "response_b": "y", "label": "AB"[n % 2]} for n in range(count)]
    rows += [{"prompt": "q", "response_a": "x", "response_b": "y"}, {"prompt": "broken"}]  # type: ignore[list-item]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_calibrate_stores_and_judge_applies(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", 40)
    common = [str(pairs), "-m", str(scripted), "--mode", "direct"]
    assert run(["judge", *common, "--calibrated"]) == 2 and "gramlite calibrate" in capsys.readouterr().err
    assert run(["calibrate", *common, "-o", str(tmp_path / "rows.jsonl")]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["calibration"]["report"]["pairs"] == 40 and "2 of 42 rows are left out" in output.err
    assert (
        Path(found["stored"]) == sidecar_path(scripted)
        and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 40
    )
    settings = Settings(mode="direct")
    with gramlite.load(scripted, settings=settings) as plain:
        expected = plain(prompt="q0", response_a="x", response_b="y").orders[0].margin or 0.0
    assert run(["judge", *common, "--calibrated"]) == 5
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    calibration = found["calibration"]
    rescaled = (expected - calibration["bias"]) / calibration["temperature"]
    assert row["orders"][0]["margin"] == pytest.approx(rescaled, abs=1e-5)
    with gramlite.load(scripted, settings=settings, calibrated=True) as judge:
        assert judge(prompt="q0", response_a="x", response_b="y").orders[0].margin == row["orders"][0]["margin"]
    with pytest.raises(InputError, match="no calibration for this judge"):
        gramlite.load(scripted, calibrated=True)
    assert run(["calibrate", *common, "--orders", "ab"]) == 0
    assert len(json.loads(sidecar_path(scripted).read_text())["calibrations"]) == 1, "of the same margins: replaced"
    assert run(["calibrate", *common[:3], "--ties", "drop"]) == 0
    assert len(json.loads(sidecar_path(scripted).read_text())["calibrations"]) == 2
    for content in ("[]", "{", '{"calibrations": [{"temperature": 0}]}', '{"calibrations": 3}'):
        sidecar_path(scripted).write_text(content)
        assert run(["judge", *common, "--calibrated"]) == ModelError.exit_code, content


def test_an_interrupted_calibration_goes_on(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, rows = pairs_file(tmp_path / "pairs.jsonl", 20), tmp_path / "rows.jsonl"
    command = ["calibrate", str(pairs), "-m", str(scripted), "--mode", "direct", "-o", str(rows)]
    assert run(command) == 0
    whole = json.loads(capsys.readouterr().out)
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:15]))
    assert run([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == whole["calibration"]


class Pondering(ScriptedBackend):
    """Thinks as many tokens as the question says, and is right only if it was not cut short."""

    def __init__(self) -> None:
        super().__init__({})
        self.asked = 0

    def _run(self, request: Request) -> Generation:
        self.asked += 1
        text = bytes(token for token in request.prompt if token < 256).decode()
        wanted = int(text.split("[User Question]\n")[1].split()[0])
        good_first = text.index("good") < text.rindex("bad")
        cut = wanted > request.budget
        margin = (2.0 if good_first else -2.0) * (-1 if cut else 1)
        generated = min(wanted, request.budget)
        return generation(margin, thinking="…", forced=cut, generated=generated)


def test_the_smallest_budget_within_noise_is_chosen() -> None:
    lengths = [10] * 30 + [50] * 30 + [90] * 2 + [400] * 1
    pairs = [
        Pair(f"{length} tokens, {n}", *(("good", "bad") if n % 2 else ("bad", "good")), label="A" if n % 2 else "B")
        for n, length in enumerate(lengths)
    ]
    backend = Pondering()
    judge = judge_on(backend).with_settings(mode="think")
    told: list[int] = []
    table, verdicts = measure(
        judge, [*pairs, Pair("5 x", "good", "bad")], budgets=(16, 64, 128, 512), on_verdict=lambda: told.append(1)
    )
    assert [(row.budget, row.accuracy) for row in table.rows] == [
        (16, pytest.approx(30 / 63, abs=1e-6)), (64, pytest.approx(60 / 63, abs=1e-6)),
        (128, pytest.approx(62 / 63, abs=1e-6)), (512, 1.0),
    ]  # fmt: skip
    assert table.chosen == 128 and table.pairs == 63, "64 is three pairs behind, more than one standard error"
    assert backend.asked == 2 * (64 + 1 + 3 + 33) and len(told) == backend.asked / 2, (
        "only what is cut short is judged anew"
    )
    alone = list(judge.with_settings(budget=128).many(pairs))
    assert [verdict.margin for verdict in verdicts[:63]] == [verdict.margin for verdict in alone]
    row = table.rows[1]
    score = stats.binomtest(60, 63).proportion_ci(method="wilson")
    assert (row.low, row.high) == pytest.approx((score.low, score.high), abs=1e-5)
    assert row.noise == pytest.approx(math.sqrt(60 / 63 * 3 / 63 / 62), abs=1e-5) and row.cut == pytest.approx(
        3 / 63, abs=1e-5
    )


def test_the_rule_compares_on_the_same_pairs() -> None:
    best = np.array([1.0] * 80 + [0.0] * 20)
    worse = np.array([1.0] * 78 + [0.0] * 22)
    shuffled = np.array([0.0] * 21 + [1.0] * 79)
    assert choose({8: worse, 99: best}) == 99, "two pairs lost and none gained"
    assert choose({8: shuffled, 99: best}) == 8, "one pair of difference among forty that changed is noise"
    assert choose({8: best, 16: best}) == 8


def test_what_cannot_be_measured_is_refused() -> None:
    judge = judge_on(Strengths())
    with pytest.raises(InputError, match="no think budget"):
        measure(judge, [])
    with pytest.raises(InputError, match="at least two"):
        measure(judge.with_settings(mode="think"), [], budgets=(5,))
    with pytest.raises(InputError, match="at least 20"):
        measure(judge_on(Pondering()).with_settings(mode="think"), [Pair("5", "good", "bad", label="A")])


def test_a_measured_budget_is_stored_and_used(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_file(tmp_path / "pairs.jsonl", 30)
    common = [str(pairs), "-m", str(scripted), "--budget", "auto"]
    assert run(["judge", *common]) == 2 and "--budget auto" in capsys.readouterr().err
    assert run(["calibrate", *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budgets"]["chosen"] == 16 and [row["budget"] for row in found["budgets"]["rows"]][-1] == 1024
    assert run(["judge", *common, "--calibrated"]) == 5
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["orders"][0]["tokens"]["generated"] == 16 and rows[0]["orders"][0]["forced"]
    with gramlite.load(scripted, settings=Settings(budget=16)) as judge:
        assert rows[0]["settings"] != judge.settings_hash, "the calibration is part of the settings"
    for refused in (["--mode", "direct"], ["-o", str(tmp_path / "rows.jsonl")], ["--calibrated"]):
        assert run(["calibrate", *common, *refused]) == 2


def test_a_rationales_sections_are_fields(scripted: Path) -> None:
    script = json.loads(scripted.read_text())
    script["rationale"] = "Feedback:\nA is terse.\n\nComparision:\nB says more.\n\nConclusion:\nB.\n</think>"
    scripted.write_text(json.dumps(script))
    with gramlite.load(scripted) as judge:
        verdict = judge(prompt="q", response_a="x", response_b="y")
        assert (verdict.feedback, verdict.comparison, verdict.conclusion) == ("A is terse.", "B says more.", "B.")
        assert verdict.to_json()["sections"] == verdict.sections == verdict.orders[0].sections
        direct = judge.with_settings(mode="direct")(prompt="q", response_a="x", response_b="y")
    assert direct.to_json()["sections"] is None and direct.conclusion is None


@pytest.mark.parametrize("ties", [True, False])
def test_what_says_nothing_is_left_out(ties: bool) -> None:
    """A row without a verdict of the model, and one without a label, whatever becomes of ties."""
    judged = {"orders": [{"order": "ab", "margin": 1.5}, {"order": "ba", "margin": None}]}
    empty: dict[str, Any] = {"orders": [{"order": "ab", "margin": None}]}
    data = labelled([(judged, None, "q"), (empty, "A", "q"), (judged, "B", "q"), (judged, "tie", "r")], ties=ties)
    assert data.outcomes.tolist() == ([0.0, 0.5] if ties else [0.0])
    assert data.ab.tolist() == [1.5] * len(data) and np.isnan(data.ba).all()


@pytest.mark.parametrize(
    ("temperature", "bias"), [(0.0, 0.0), (-0.5, 0.0), (float("inf"), 0.0), (1.0, float("nan")), ("warm", 0.0)]
)
def test_a_stored_calibration_that_cannot_be_is_refused(temperature: Any, bias: float, tmp_path: Path) -> None:
    artifact = tmp_path / "judge.gguf"
    entry = {"temperature": temperature, "bias": bias, "model": "x", "adapter": None, "settings": "y", "report": {}}
    sidecar_path(artifact).write_text(json.dumps({"calibrations": [entry]}))
    with pytest.raises(ModelError, match="is no calibration"):
        stored_calibration(artifact, {"sha256": "x"}, {})


def test_certainty_shares_the_last_bin() -> None:
    """Of 0.95 to 1, both ends included: one right and one wrong verdict there err by the gap of their means."""
    p_a = np.array([1.0, 0.96, 0.0])
    error = expected_calibration_error(p_a, np.array([1.0, 0.0, 0.0]))
    assert error == pytest.approx(abs((1.0 - 1) + (0.96 - 0) + (1.0 - 1)) / 3)
    assert expected_calibration_error(np.array([1.0, 0.96]), np.array([0.0, 1.0])) == pytest.approx((1.0 - 0.04) / 2)


def test_the_fall_is_what_of_the_error_went() -> None:
    report = calibrate(overconfident(200, temperature=3.0, bias=0.5), {}, {}).report
    before, after, fall = (report[name][0] for name in ("error_before", "error_after", "fall"))
    assert 0 < after < before and fall == pytest.approx(1 - after / before, abs=1e-4)


def test_bins_are_of_equal_width_from_one_half_to_one() -> None:
    """Ten of 0.05 each: 0.52 and 0.56 lie apart, so that their gaps do not cancel."""
    error = expected_calibration_error(np.array([0.52, 0.56]), np.array([1.0, 0.0]))
    assert error == pytest.approx((0.48 + 0.56) / 2)
