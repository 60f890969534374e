"""Timing: fair turns, ratios of what ran side by side, the floor, and one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gramlite.bench import speed
from gramlite.bench.speed import (
    Kernels,
    SpeedReport,
    floor_seconds,
    measure_kernels,
    measure_speed,
    read_pairs,
    speed_table,
)
from gramlite.bench.turns import Contender, Ratio, ratio, summary, take_turns, turns_of

from gramlite import RuntimeOptions, load
from gramlite.cli import run
from gramlite.errors import InputError
from gramlite.judging.pair import Pair

PAIRS = [Pair(f"q{i}", "a", "b", id=str(i)) for i in range(5)]


def clocked(monkeypatch: pytest.MonkeyPatch, costs: dict[str, float]) -> tuple[list[Contender], list[tuple[str, str]]]:
    """Contenders that take so many seconds a pair on a clock of their own, and the order in which they were called."""
    clock, called = [0.0], []
    monkeypatch.setattr("gramlite.bench.turns.time.perf_counter", lambda: clock[0])

    def of(name: str) -> Callable[[Sequence[Pair]], object]:
        def judge(pairs: Sequence[Pair]) -> object:
            clock[0] += costs[name] * len(pairs) * (1 + len(called) / 10)  # a machine that gets slower
            called.append((name, "".join(str(pair.id) for pair in pairs)))
            return None

        return judge

    return [Contender(name, of(name)) for name in costs], called


def test_turns_are_fair_and_a_drift_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders, called = clocked(monkeypatch, {"ours": 1.0, "plain": 2.0, "slow": 4.0})
    ticks: list[int] = []
    take_turns(contenders, PAIRS, group=2, repetitions=2, tick=lambda: ticks.append(1))
    assert len(ticks) == len(called) == turns_of(3, 5, group=2, repetitions=2) == 21
    assert called[:3] == [("ours", "0"), ("plain", "0"), ("slow", "0")]  # the warm-up
    rounds = [called[start : start + 3] for start in range(3, 21, 3)]
    assert [{pairs for _, pairs in one} for one in rounds] == [{"01"}, {"23"}, {"4"}] * 2
    assert all({name for name, _ in one} == {"ours", "plain", "slow"} for one in rounds)
    assert len({one[0][0] for one in rounds}) == 3  # each begins a round as often as the others
    assert [len(contender.seconds) for contender in contenders] == [6, 6, 6]
    found = ratio(contenders[1], contenders[0])
    assert (found.slower, found.faster, found.turns) == ("plain", "ours", 6)
    assert found.low <= found.median <= found.high and found.median == pytest.approx(2, rel=0.1)
    assert ratio(contenders[0], contenders[0]).median == 1


def row(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    tokens = {"prompt": prompt, "cached": cached, "generated": generated}
    return {"orders": [{"tokens": tokens}, {"tokens": {**tokens, "cached": cached + 50}}]}


def test_the_floor_counts_distinct_tokens_and_joint_steps() -> None:
    kernels = Kernels(prefill_rate=100.0, step_seconds=0.5)
    computed = (200 + 4 - 100) + (200 + 4 - 150)
    assert floor_seconds([row(200, 100, 0)], kernels, prefix_tokens=4, parallel=1) == pytest.approx(computed / 100)
    together = floor_seconds([row(200, 100, 30)], kernels, prefix_tokens=4, parallel=2)
    assert together == pytest.approx(computed / 100 + 30 * 0.5)
    alone = floor_seconds([row(200, 100, 30)], kernels, prefix_tokens=4, parallel=1)
    assert alone == pytest.approx(computed / 100 + 60 * 0.5)


def report_of() -> SpeedReport:
    ours, plain = Contender("gramlite, direct", print), Contender("transformers float32, letter", print)
    ours.seconds, plain.seconds = [1.0, 1.1, 1.2], [3.0, 3.3, 3.6]
    times = {
        one.name: {"median": one.seconds[1], "low": one.seconds[0], "high": one.seconds[2]} for one in (ours, plain)
    }
    kernels = {"direct": Kernels(300.0, 0.02)}
    return SpeedReport(times, [ratio(plain, ours)], kernels, {"gramlite, direct": 0.05}, {"model": "m"})


def test_one_table_has_the_ratios_and_their_spread() -> None:
    ours, plain = speed_table(report_of()).texts()
    assert ours["times gramlite's"] == "1" and ours["over the floor"] == "+5.0%"
    assert plain["times gramlite's"] == "3.00 (3.00 to 3.00)" and plain["over the floor"] == ""
    assert plain["seconds a pair"] == "3.300" and plain["middle half"] == "3.000 to 3.600"


def test_the_command_hands_on_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measure(model: Path, pairs: Sequence[Pair], **options: Any) -> SpeedReport:
        asked.update(model=model, pairs=len(pairs), **options)
        return report_of()

    monkeypatch.setattr(speed, "measure_speed", measure)

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(speed.command, arguments, standalone_mode=False)

    result = invoke(
        "-m", "judge.gguf", "--limit", "4", "--against", "transformers,llama-cpp-python", "--checkpoint", str(tmp_path)
    )
    assert json.loads(result.stdout)["ratios"][0]["median"] == pytest.approx(3)
    assert asked["against"] == ["transformers", "llama-cpp-python"] and asked["checkpoint"] == tmp_path
    assert (asked["pairs"], asked["repetitions"]) == (4, 3)
    for arguments, message in (
        (["--against", "vllm"], "does not know vllm"),
        (["-m", "judge.gguf", "--against", "transformers"], "--checkpoint FOLDER"),
    ):
        result = invoke(*arguments)
        assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_pairs_that_are_too_long_to_compare_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lengths = [10, 5000, 10, 10]
    rows = [{"prompt": "q" * n, "response_a": "a", "response_b": "b"} for n in lengths]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert len(read_pairs(path, 10)) == 3 and len(read_pairs(path, 2)) == 2
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(InputError, match="fewer than two pairs"):
        read_pairs(path, 10)


def test_kernels_are_timed_on_the_judges_own_context(reference_q8: Path) -> None:
    with load(reference_q8, runtime=RuntimeOptions(device="cpu", parallel=2)) as judge:
        kernels = measure_kernels(judge, [tuple(range(100, 164))], 16, repetitions=1)
        assert kernels.prefill_rate > 0 and kernels.step_seconds > 0
        assert judge.with_settings(mode="direct")(prompt="q", response_a="x", response_b="y").winner


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_contenders_are_in_one_report(reference_q8: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from gramlite.reference.files import build_checkpoint

    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    report = measure_speed(
        reference_q8, PAIRS[:2], repetitions=1, against=["llama-cpp-python", "transformers"], checkpoint=checkpoint
    )
    assert list(report.contenders) == [
        "gramlite, direct", "llama-cpp-python, probability", "llama-cpp-python, letter", "transformers float32, letter",
        "gramlite, think", "llama-cpp-python, rationale", "transformers float32, rationale",
    ]  # fmt: skip
    assert len(report.ratios) == 5 and all(one.low <= one.median <= one.high for one in report.ratios)
    assert report.settings["peak_memory_mib"] > 100 and report.settings["versions"]["transformers"]


@pytest.mark.fault("speed-minimums")
@pytest.mark.parametrize("pairs", [2, 3, 12])
def test_the_smallest_run_of_any_judge(pairs: int, scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "speed", "-m", str(scripted), "--limit", str(pairs), "--repetitions", "1"]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == {} == report["overhead_over_floor"]  # which are llama.cpp's
    for times in report["contenders"].values():
        assert 0 < times["low"] <= times["median"] <= times["high"]
    assert report["settings"]["bytes"] == scripted.stat().st_size and report["settings"]["pairs"] == pairs


@pytest.mark.fault("speed-minimums")
def test_quartiles_of_one_turn() -> None:
    one, other = Contender("one", len, [3.0]), Contender("other", len, [1.5])
    assert ratio(one, other) == Ratio("one", "other", 2.0, 2.0, 2.0, 1)
    assert summary([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}


@pytest.mark.fault("speed-minimums")
def test_rows_that_took_no_judging_have_no_floor() -> None:
    assert floor_seconds([{"orders": []}], Kernels(100, 0.01), prefix_tokens=4, parallel=1) == 0


@pytest.mark.fault("speed-minimums")
def test_pairs_that_need_no_judging_are_not_timed(
    scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    same = json.dumps({"prompt": "q", "response_a": "a", "response_b": "a"}) + "\n"
    path.write_text(same * 3)
    assert run(["bench", "speed", "-m", str(scripted), "--pairs", str(path)]) == 2
    assert "fewer than two pairs" in capsys.readouterr().err
    assert run(["bench", "speed", "-m", str(scripted), "--pairs", str(tmp_path)]) == 2


@pytest.mark.slow
@pytest.mark.fault("speed-minimums")
def test_a_gguf_file_at_the_minimum(reference_q8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "response_a": "a", "response_b": b}) + "\n" for b in "xy"))
    arguments = ["--pairs", str(path), "--limit", "2", "--repetitions", "1"]
    assert run(["bench", "speed", "-m", str(reference_q8), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["kernels"]) == {"direct", "think"} and report["settings"]["bytes"] == reference_q8.stat().st_size


@pytest.mark.slow
@pytest.mark.fault("speed-minimums")
def test_a_folder_is_timed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from gramlite.reference.files import build_checkpoint

    folder = build_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "response_a": "a", "response_b": b}) + "\n" for b in "xy"))
    arguments = ["bench", "speed", "-m", str(folder), "--pairs", str(path), "--limit", "2", "--repetitions", "1"]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["bytes"] > 200e6 and list(report["contenders"]) == ["gramlite, direct", "gramlite, think"]
    assert run([*arguments, "--against", "llama-cpp-python"]) == 2
    assert "needs a GGUF file" in capsys.readouterr().err
