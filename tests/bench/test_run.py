"""Run folders: judged with a scripted backend and the reference judge, killed, gone on with, scored."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gramlite.bench.comparison import compare_runs
from gramlite.bench.folder import read_run
from gramlite.bench.run import run_suite
from gramlite.bench.work import load_work, pair_digest

from gramlite.errors import InputError, IntegrityError
from gramlite.judging.judge import Settings
from gramlite.loading import load
from gramlite.reference.files import build_checkpoint
from gramlite.rows.display import Display


def write_pairs(path: Path, count: int, **extra: Any) -> Path:
    rows = [
        {"id": f"p{i}", "prompt": f"q{i % 7}", "response_a": f"a{i}", "response_b": f"b{i}", "label": "AB"[i % 2],
         "subset": "xy"[i % 2], **extra}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, work_from: str, folder: Path, *, limit: int | None = None, **options: Any) -> dict[str, Any]:
    settings = options.pop("settings", Settings(mode="direct"))
    with load(model, settings=settings) as judge, Display(as_json=True, quiet=True, total=None) as display:
        return run_suite(judge, load_work(work_from, limit), folder, display=display, **options)


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_run_folder(scripted: Path, tmp_path: Path) -> None:
    suite = write_pairs(tmp_path / "pairs.jsonl", 20)
    record = run(scripted, f"pairs:{suite}", tmp_path / "one")
    found = read_run(tmp_path / "one")
    assert len(found.rows) == record["rows"] == 20
    row = found.rows["p3"]
    assert (row["label"], row["meta"]["subset"], row["input"]) == (
        "B",
        "y",
        pair_digest(load_work(f"pairs:{suite}").pairs[3]),
    )
    assert row["seconds"] >= 0 and {order["order"] for order in row["orders"]} == {"ab", "ba"}
    assert found.record["suite"]["pairs"] == 20 and len(found.record["suite"]["sha256"]) == 64
    assert found.record["versions"]["gramlite"] and found.record["hardware"]["cores"]
    assert found.record["finished"] and found.record["no_verdict"] == 0
    right = [row["verdict"] == row["label"] for row in found.rows.values()]
    assert found.record["score"]["scores"]["accuracy"] == pytest.approx(sum(right) / 20)
    assert compare_runs(found, found).counts["prompts"] == 7


def test_the_same_command_gives_the_same_rows(scripted: Path, tmp_path: Path) -> None:
    suite = write_pairs(tmp_path / "pairs.jsonl", 50)
    for name in ("one", "two"):
        run(scripted, f"pairs:{suite}", tmp_path / name, settings=Settings(mode="think"))
    assert rows_without_times(tmp_path / "one") == rows_without_times(tmp_path / "two")


def test_an_existing_run_is_left_alone_gone_on_with_or_begun_anew(scripted: Path, tmp_path: Path) -> None:
    suite = f"pairs:{write_pairs(tmp_path / 'pairs.jsonl', 20)}"
    folder = tmp_path / "one"
    run(scripted, suite, folder, limit=5)
    with pytest.raises(InputError, match="--resume"):
        run(scripted, suite, folder)
    record = run(scripted, suite, folder, resume=True)  # a larger limit goes on
    assert (record["kept"], record["rows"]) == (5, 20)
    assert run(scripted, suite, folder, resume=True)["kept"] == 20
    record = run(scripted, suite, folder, limit=3, force=True)
    assert (record["kept"], record["rows"], len(read_run(folder).rows)) == (0, 3, 3)


def test_another_model_setting_or_suite_is_refused(scripted: Path, tmp_path: Path) -> None:
    suite = write_pairs(tmp_path / "pairs.jsonl", 5)
    folder = tmp_path / "one"
    run(scripted, f"pairs:{suite}", folder)
    with pytest.raises(IntegrityError, match='orders: "both" → "ab"'):
        run(scripted, f"pairs:{suite}", folder, resume=True, settings=Settings(mode="direct", orders="ab"))
    other = write_pairs(tmp_path / "other.jsonl", 5, note="changed")
    with pytest.raises(IntegrityError, match=r"suite\.sha256"):
        run(scripted, f"pairs:{other}", folder, resume=True)


def test_a_torn_row_and_a_row_without_verdict_are_judged_again(scripted: Path, tmp_path: Path) -> None:
    suite = f"pairs:{write_pairs(tmp_path / 'pairs.jsonl', 10)}"
    folder = tmp_path / "one"
    run(scripted, suite, folder)
    whole = {row["id"]: row for row in rows_without_times(folder)}
    lines = (folder / "rows.jsonl").read_text().splitlines()
    failed = {**json.loads(lines[2]), "verdict": None, "reason": "no answer"}
    (folder / "rows.jsonl").write_text("\n".join([lines[0], lines[1], json.dumps(failed), lines[3][:40]]))
    record = run(scripted, suite, folder, resume=True)
    assert (record["kept"], record["rows"], record["no_verdict"]) == (2, 10, 0)
    assert {row["id"]: row for row in rows_without_times(folder)} == whole


def test_a_pair_that_cannot_be_judged_is_counted(scripted: Path, tmp_path: Path) -> None:
    suite = write_pairs(tmp_path / "pairs.jsonl", 4)
    with suite.open("a") as file:
        file.write(json.dumps({"id": "same", "prompt": "q", "response_a": "x", "response_b": "x", "label": "A"}) + "\n")
    record = run(scripted, f"pairs:{suite}", tmp_path / "one")
    rows = read_run(tmp_path / "one").rows
    assert rows["same"]["verdict"] == "tie" and record["no_verdict"] == 0
    assert record["score"]["n"] == 5


def test_ids_must_be_unique_and_there_must_be_pairs(tmp_path: Path) -> None:
    path = tmp_path / "hhh.jsonl"
    row = {"id": "x", "prompt": "q", "response_a": "a", "response_b": "b", "label": "A", "subset": "helpful"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match="'x' more than once"):
        load_work(f"hhh:{path}")
    path.write_text("")
    with pytest.raises(InputError, match="no pair"):
        load_work(f"hhh:{path}")


# --- as a process --------------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    # a process started in the background ignores SIGINT, and so do its children until they say otherwise
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listening}; from gramlite.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "run"]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def wait_for_rows(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "rows.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError("no rows were written")


def test_a_killed_run_goes_on_and_ends_with_one_row_a_pair(scripted: Path, tmp_path: Path) -> None:
    suite = write_pairs(tmp_path / "pairs.jsonl", 40)
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps({**json.loads(scripted.read_text()), "seconds": 0.02}))
    arguments = [f"pairs:{suite}", "-m", slow, "--mode", "direct", "-o", tmp_path / "killed"]
    process = start(*arguments)
    wait_for_rows(tmp_path / "killed", 8)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["finished"] is None
    finished = start(*arguments, "--resume")
    out, err = finished.communicate(timeout=120)
    assert finished.returncode == 0, err
    assert json.loads(out)["rows"] == 40
    run(slow, f"pairs:{suite}", tmp_path / "whole")
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["kept"] >= 8


def test_an_interrupt_says_how_to_go_on(scripted: Path, tmp_path: Path) -> None:
    suite = write_pairs(tmp_path / "pairs.jsonl", 400)
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps({**json.loads(scripted.read_text()), "seconds": 0.05}))
    process = start(f"pairs:{suite}", "-m", slow, "--mode", "direct", "-o", tmp_path / "one")
    wait_for_rows(tmp_path / "one", 3)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted." in err and "--resume" in err


# --- with the reference judge --------------------------------------------------------------------------------


def test_the_reference_judge_agrees_with_gold(reference_q8: Path, shared: Path, tmp_path: Path) -> None:
    suite = shared / "benchmarks" / "autoj.small.jsonl"
    run(reference_q8, f"autoj:{suite}", tmp_path / "q8", limit=4)
    found = compare_runs(read_run(shared / "reference-judge" / "direct_fp32.jsonl.gz"), read_run(tmp_path / "q8"))
    assert found.counts["common"] == found.counts["judged"] == 4
    assert found.measures["flips"].change.value <= 1 / 4
    assert 0.01 < found.measures["margin"].change.value < 0.6


def lasting(tmp_path: Path) -> Path:
    """Where the runs of a slow test lie: in GRAMLITE_TEST_RUNS, where a test that was cut off goes on, else nowhere."""
    named = os.environ.get("GRAMLITE_TEST_RUNS")
    return Path(named) if named else tmp_path


def bytes_without_times(folder: Path) -> bytes:
    """The rows as they lie on the disk, without the one field that is a time."""
    written = (folder / "rows.jsonl").read_bytes()
    cut, count = re.subn(rb', "seconds": [0-9.e-]+', b"", written)
    assert count == written.count(b"\n")
    return cut


@pytest.mark.slow
def test_deterministic_thinking_twice_gives_the_same_bytes(reference_q8: Path, shared: Path, tmp_path: Path) -> None:
    suite = f"autoj:{shared / 'benchmarks' / 'autoj.small.jsonl'}"
    folders = [lasting(tmp_path) / f"deterministic-{name}" for name in ("one", "two")]
    for folder in folders:
        resume = ["--resume"] if folder.exists() else []
        process = start(
            suite, "-m", reference_q8, "--mode", "think", "--deterministic", "--limit", 50, "-o", folder, *resume
        )
        _, err = process.communicate(timeout=3000)
        assert process.returncode in (0, 5), err
    first, second = map(bytes_without_times, folders)
    assert first == second and first.count(b"\n") == 50
    assert all(order["rationale"] for row in rows_without_times(folders[0]) for order in row["orders"])


@pytest.mark.slow
def test_f16_reproduces_every_clear_gold_verdict(shared: Path, tmp_path: Path) -> None:
    """The reference checkpoint exported as F16 against float32, on all of Auto-J."""
    from gramlite.export.gguf import export_gguf

    model, folder = tmp_path / "F16.gguf", lasting(tmp_path) / "F16"
    export_gguf(build_checkpoint(tmp_path / "checkpoint"), model)
    suite = f"autoj:{shared / 'benchmarks' / 'autoj.jsonl.gz'}"
    run(model, suite, folder, resume=(folder / "rows.jsonl").exists())
    gold, rows = read_run(shared / "reference-judge" / "direct_fp32.jsonl.gz").rows, read_run(folder).rows
    clear = [i for i in rows if abs(sum(order["margin"] for order in gold[i]["orders"]) / 2) > 0.05]
    assert len(rows) == 1069 and len(clear) > 900
    assert [i for i in clear if rows[i]["verdict"] != gold[i]["verdict"]] == []
