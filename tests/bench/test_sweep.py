"""The sweep: types as they are typed, parts made once, folders gone on with, failures kept apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gramlite.bench import sweep as sweep_module
from gramlite.bench import variants
from gramlite.bench.builder import Builder, Target, build_in_child, is_intact
from gramlite.bench.folder import read_run
from gramlite.bench.progress import SweepProgress
from gramlite.bench.sweep import command
from gramlite.bench.variants import SweepSource, artifact_target, parse_types, parse_variant
from gramlite.bench.work import load_work

from gramlite.errors import GateError, GramliteError, InputError, IntegrityError, ModelError

from . import sweep_fakes
from .test_run import rows_without_times, wait_for_rows, write_pairs

# --- types ---------------------------------------------------------------------------------------------------


def test_types_are_spelled_as_llama_cpp_spells_them() -> None:
    found = parse_types("f16, q8_0,Q4_0+IMATRIX,Auto:4.5BPW,gptq:4x64,GPTQ:4x32:asym:q8_0,gptq:3x64:v_proj=8:no-focus")
    assert [variant.name for variant in found] == [
        "F16", "Q8_0", "Q4_0+imatrix", "auto:4.5bpw", "gptq:4x64", "gptq:4x32:asym:q8_0", "gptq:3x64:v_proj=8:no-focus",
    ]  # fmt: skip
    assert [variant.is_calibrated for variant in found] == [False, False, True, True, True, True, True]
    assert found[5].gptq == {"bits": 4, "group_size": 32, "symmetric": False} and found[5].embedding == "q8_0"
    assert found[6].gptq == {"bits": 3, "group_size": 64, "focus": False, "exceptions": (("v_proj", 8),)}


@pytest.mark.parametrize(
    "text",
    [
        "Q9_0",
        "F16+imatrix",
        "Q4_0+",
        "auto:many",
        "Q4_0+hessian",
        "gptq:4",
        "gptq:4x64:fast",
        "gptq:4x64:v_proj=x",
        "onnx",
    ],
)
def test_unknown_types_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="There is no type|no option"):
        parse_variant(text)


def test_a_model_that_is_there_already(fakes: list[str], tmp_path: Path) -> None:
    sweep_fakes.build_scripted(tmp_path / "other.gguf", name="other", kind="Q8_0", seconds=0)
    rows = lines_of(sweep(tmp_path, types=f"F16,my own={tmp_path / 'other.gguf'}"))
    assert [row["type"] for row in rows] == ["F16", "my own"] and rows[1]["bits_per_weight"] == 8.5
    assert rows[1]["flips"]["n"] == 20 and fakes == ["F16.gguf"]
    assert (tmp_path / "out/runs/pairs/my-own/rows.jsonl").is_file()
    with pytest.raises(InputError, match="no model at 'nowhere.gguf'"):
        parse_variant("mine=nowhere.gguf")


def test_a_type_twice_or_none_is_refused() -> None:
    with pytest.raises(InputError, match="Q8_0 twice"):
        parse_types("F16,Q8_0,q8_0")
    with pytest.raises(InputError, match="no type"):
        parse_types(" , ")


def checkpoint_at(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_what_a_type_is_made_of(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 3)
    source = SweepSource(checkpoint=checkpoint_at(tmp_path / "ckpt"), calibration=pairs)

    def part(text: str, of: SweepSource = source) -> Target:
        return artifact_target(parse_variant(text), of, tmp_path)

    assert [need.path.name for need in part("Q4_K_M").needs] == ["F16.gguf"]
    assert [need.path.name for need in part("Q4_0+imatrix").needs] == ["transcripts.jsonl", "imatrix.gguf"]
    (gptq,) = part("gptq:4x64:q8_0").needs
    assert gptq == part("gptq:4x64").needs[0] or gptq.path == part("gptq:4x64").needs[0].path
    assert part("gptq:4x64:q8_0").path != part("gptq:4x64").path
    fewer = SweepSource(checkpoint=source.checkpoint, calibration=pairs, tokens=1000)
    assert part("Q4_K_M", fewer).record == part("Q4_K_M").record  # the calibration is nothing to it
    for text in ("gptq:4x64", "auto:4.5bpw", "Q4_0+imatrix"):
        assert part(text, fewer).record != part(text).record
    thinking = replace(source, mode="think")
    assert part("Q4_K_M", thinking).record == part("Q4_K_M").record
    for text in ("gptq:4x64", "auto:4.5bpw", "Q4_0+imatrix"):
        assert part(text, thinking).record != part(text).record
    (source.checkpoint / "model.safetensors").write_bytes(b"other weights")
    assert part("F16", SweepSource(checkpoint=source.checkpoint)).record != {}
    with pytest.raises(InputError, match="--calibration"):
        part("gptq:4x64", SweepSource(checkpoint=source.checkpoint))


# --- parts ---------------------------------------------------------------------------------------------------


def write_twice(path: Path) -> None:
    path.write_text("made")


def test_a_part_is_made_once_and_again_when_it_is_due(tmp_path: Path) -> None:
    made: list[str] = []
    builder = Builder(lambda part: made.append(part.path.name) or part.build(part.path), lambda name: None)  # type: ignore[func-returns-value]
    need = Target(tmp_path / "need", {"step": 1}, write_twice)
    part = Target(tmp_path / "part", {"step": 2}, write_twice, (need,))
    assert builder.ensure(part) == tmp_path / "part"
    builder.ensure(part)
    assert made == ["need", "part"]
    (tmp_path / "part").write_text("fade")  # other bytes
    builder.ensure(part)
    assert made == ["need", "part", "part"]
    part.note.write_text("{")
    assert not is_intact(part)
    changed = Target(tmp_path / "need", {"step": 9}, write_twice)
    builder.ensure(Target(tmp_path / "part", {"step": 2}, write_twice, (changed,)))
    assert made[3:] == ["need", "part"]  # what is made of something else is something else


def test_what_failed_once_is_not_tried_again(tmp_path: Path) -> None:
    tries: list[Path] = []

    def fail(part: Target) -> None:
        tries.append(part.path)
        raise ModelError("no")

    need = Target(tmp_path / "need", {}, write_twice)
    builder = Builder(fail)
    for name in ("one", "two"):
        with pytest.raises(ModelError, match="no"):
            builder.ensure(Target(tmp_path / name, {}, write_twice, (need,)))
    assert tries == [tmp_path / "need"]


def crash(path: Path) -> None:
    os.abort()


def complain(path: Path) -> None:
    print("to the log")
    raise ValueError("seven is no multiple of 32")


def test_a_crash_of_native_code_is_an_error_like_others(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(GramliteError, match="ended with exit code -6"):
        build_in_child(Target(tmp_path / "part", {}, sweep_fakes_build("Q3_K_M")), log)
    with pytest.raises(ModelError, match="too short"):
        build_in_child(Target(tmp_path / "part", {}, sweep_fakes_build("Q2_K")), log)
    build_in_child(Target(tmp_path / "part", {}, sweep_fakes_build("Q8_0")), log)
    assert (tmp_path / "part").is_file()


def sweep_fakes_build(kind: str) -> Any:
    source = Path(sweep_fakes.__file__)
    return sweep_fakes.artifact_target(parse_variant(kind), SweepSource(checkpoint=source.parent), source.parent).build


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Scripted artifacts, made in this process; the list names what was made."""
    made: list[str] = []

    def run(part: Target, log: Path) -> None:
        made.append(part.path.name)
        if part.path.name.startswith(sweep_fakes.CRASHES):
            raise GramliteError("the maker crashed")
        part.build(part.path)

    monkeypatch.setattr(sweep_module, "artifact_target", sweep_fakes.artifact_target)
    monkeypatch.setattr(sweep_module, "build_in_child", run)
    return made


def sweep(folder: Path, *arguments: object, types: str = "F16,Q8_0,Q4_0") -> Result:
    checkpoint = folder / "ckpt" if (folder / "ckpt").exists() else checkpoint_at(folder / "ckpt")
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs, 20)
    given = [checkpoint, "--types", types, "-o", folder / "out", *arguments]
    if "--suite" not in given:
        given += ["--suite", f"pairs:{pairs}"]
    return CliRunner().invoke(command, [str(argument) for argument in given], standalone_mode=False)


def lines_of(result: Result) -> list[dict[str, Any]]:
    assert not result.exception, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_one_command_makes_judges_and_compares(fakes: list[str], tmp_path: Path) -> None:
    result = sweep(tmp_path)
    assert result.return_value == 0
    rows = lines_of(result)
    assert [row["type"] for row in rows] == ["F16", "Q8_0", "Q4_0"]
    assert rows[0]["accuracy"]["n"] == 20 and rows[0]["margin_error"] is None
    assert rows[1]["flips"]["value"] == 0 and rows[1]["accuracy_change"]["value"] == 0
    assert [row["bits_per_weight"] for row in rows] == [16.0, 8.5, 4.5]
    assert rows[1]["bytes"] == (tmp_path / "out/artifacts/Q8_0.gguf").stat().st_size
    assert fakes == ["F16.gguf", "Q8_0.gguf", "Q4_0.gguf"]
    run = read_run(tmp_path / "out/runs/pairs/Q8_0")
    assert run.name == "Q8_0" and run.model["manifest"]["quantization"] == "Q8_0" and len(run.rows) == 20
    table = (tmp_path / "out/results.md").read_text()
    assert "| F16 |" in table and "pairs, 20 pairs, 20 of them labelled A or B" in table
    assert (tmp_path / "out/results.csv").read_text().count("\n") == 4
    assert not list((tmp_path / "out/artifacts").glob(".*.tmp")) or fakes  # swept at the next start


def test_a_second_time_nothing_is_made_or_judged(
    fakes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lines_of(sweep(tmp_path))
    fakes.clear()
    monkeypatch.setattr("gramlite.options.JudgeOptions.open", lambda self: pytest.fail("opened a model"))
    second = sweep(tmp_path)
    assert lines_of(second) == first and fakes == []
    assert "20 pairs (20 from before)" in second.stderr
    assert not list((tmp_path / "out/artifacts").glob(".*.tmp"))


def test_a_damaged_artifact_is_made_again(fakes: list[str], tmp_path: Path) -> None:
    sweep(tmp_path)
    fakes.clear()
    path = tmp_path / "out/artifacts/Q8_0.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert sweep(tmp_path).return_value == 0
    assert fakes == ["Q8_0.gguf"] and path.read_bytes() == whole


def test_more_types_and_more_pairs_go_on_and_fewer_are_cut(fakes: list[str], tmp_path: Path) -> None:
    sweep(tmp_path, "--limit", 5, types="F16,Q8_0")
    result = sweep(tmp_path, "--limit", 12)
    assert "Q8_0: pairs, 12 pairs (5 from before)" in result.stderr
    assert {row["pairs"] for row in lines_of(result)} == {12}
    assert fakes == ["F16.gguf", "Q8_0.gguf", "Q4_0.gguf"]
    rows = lines_of(sweep(tmp_path, "--limit", 3, types="F16,Q4_0"))
    assert {row["pairs"] for row in rows} == {3} and rows[1]["flips"]["n"] == 3
    assert len(read_run(tmp_path / "out/runs/pairs/Q4_0").rows) == 12  # nothing is thrown away


def test_a_type_that_fails_does_not_end_the_sweep(fakes: list[str], tmp_path: Path) -> None:
    result = sweep(tmp_path, types="F16,Q2_K,Q3_K_M,Q8_0")
    assert result.return_value == 5
    rows = {row["type"]: row for row in lines_of(result)}
    assert rows["Q2_K"]["failure"] == "the rows of every matrix are too short"
    assert rows["Q3_K_M"]["failure"] == "the maker crashed" and rows["Q3_K_M"]["flips"] is None
    assert rows["Q8_0"]["failure"] is None and rows["Q8_0"]["flips"]["n"] == 20
    assert "the rows of every matrix are too short" in (tmp_path / "out/results.md").read_text()
    record = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [bool(outcome["failure"]) for outcome in record["types"]] == [False, True, True, False]


def test_without_its_base_a_sweep_fails(fakes: list[str], tmp_path: Path) -> None:
    result = sweep(tmp_path, types="Q2_K,Q8_0")
    assert isinstance(result.exception, ModelError) and fakes == ["Q2_K.gguf"]


def test_a_folder_of_another_sweep_is_left_alone(fakes: list[str], tmp_path: Path) -> None:
    sweep(tmp_path, types="F16,Q8_0")
    result = sweep(tmp_path, "--orders", "ab", types="F16,Q8_0")
    assert isinstance(result.exception, IntegrityError) and 'orders: "both" → "ab"' in str(result.exception)
    (tmp_path / "ckpt/model.safetensors").write_bytes(b"trained on")
    result = sweep(tmp_path, types="F16,Q8_0")
    assert isinstance(result.exception, IntegrityError) and "checkpoint.sha256" in str(result.exception)
    fakes.clear()
    result = sweep(tmp_path, "--force", "--orders", "ab", types="F16,Q8_0")
    assert result.return_value == 0 and fakes == ["F16.gguf", "Q8_0.gguf"]
    assert all(len(row["orders"]) == 1 for row in read_run(tmp_path / "out/runs/pairs/Q8_0").rows.values())


CALIBRATED = "F16,Q4_0+imatrix"


@pytest.mark.fault("transcripts")
@pytest.mark.parametrize("mode", ["direct", "think"])
def test_calibration_is_judged_in_the_mode_of_the_sweep(
    mode: str, fakes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "calibration.jsonl", 5)
    asked: list[SweepSource] = []
    monkeypatch.setattr(
        sweep_module,
        "artifact_target",
        lambda v, source, folder: asked.append(source) or sweep_fakes.artifact_target(v, source, folder),
    )
    assert sweep(tmp_path, "--calibration", pairs, "--mode", mode, types=CALIBRATED).return_value == 0
    judged: list[str] = []
    monkeypatch.setattr(
        "gramlite.quant.calibration.load_calibration", lambda *_, **options: judged.append(options["mode"]) or ([], {})
    )
    variants.build_transcripts(tmp_path / "transcripts.jsonl", source=asked[-1], judge=tmp_path)
    assert judged == [mode]
    record = json.loads((tmp_path / "out/sweep.json").read_text())
    assert record["asked"]["calibration"]["mode"] == record["asked"]["settings"]["mode"] == mode
    assert f"Calibrated on judging in {mode} mode." in (tmp_path / "out/results.md").read_text()


@pytest.mark.fault("transcripts")
def test_a_calibration_of_another_mode_is_refused(fakes: list[str], tmp_path: Path) -> None:
    """That of a folder from before the mode was recorded, too, which was judged in think mode whatever was asked."""
    pairs = write_pairs(tmp_path / "calibration.jsonl", 5)
    asked = ["--calibration", pairs]
    assert sweep(tmp_path, *asked, types=CALIBRATED).return_value == 0
    result = sweep(tmp_path, *asked, "--mode", "think", types=CALIBRATED)
    assert 'calibration.mode: "direct" → "think"' in str(result.exception)
    path = tmp_path / "out/sweep.json"
    record = json.loads(path.read_text())
    del record["asked"]["calibration"]["mode"], record["asked"]["calibration"]["transcripts"]
    path.write_text(json.dumps(record))
    result = sweep(tmp_path, *asked, types=CALIBRATED)
    assert isinstance(result.exception, IntegrityError) and "calibration.mode" in str(result.exception)
    assert sweep(tmp_path, *asked, "--force", types=CALIBRATED).return_value == 0


@pytest.mark.fault("transcripts")
def test_finished_transcripts_have_no_mode(fakes: list[str], tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    path.write_text('{"version": 2, "prompt_ids": [1], "generated_ids": [2]}\n')
    assert sweep(tmp_path, "--calibration", path, types=CALIBRATED).return_value == 0
    assert json.loads((tmp_path / "out/sweep.json").read_text())["asked"]["calibration"]["mode"] is None
    assert "Calibrated on transcripts as they were recorded." in (tmp_path / "out/results.md").read_text()


def test_the_gate_ends_the_sweep(fakes: list[str], tmp_path: Path) -> None:
    result = sweep(tmp_path, "--gate", "flips<=1", "--junit", tmp_path / "gate.xml", "--github", types="F16,Q8_0")
    assert isinstance(result.exception, GateError) and "undecidable for Q8_0" in str(result.exception)
    assert "::error" in result.stderr and 'failures="1"' in (tmp_path / "gate.xml").read_text()
    assert (tmp_path / "out/results.md").is_file()
    assert sweep(tmp_path, "--gate", "flips<=1", "--undecided", "pass", types="F16,Q8_0").return_value == 0
    assert sweep(tmp_path, "--gate", "flips<=90", types="F16,Q8_0").return_value == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "5", "--sample", "5"], "one of them"),
        (["--sample", "5,5"], "neither a number for all"),
        (["--sample", "0"], "neither a number for all"),
        (["--junit", "gate.xml"], "add --gate"),
        (["--calibration", "nowhere.jsonl"], "no file nowhere"),
        (["--suite", "pairs/z:PAIRS"], "no subset 'z'"),
    ],
)
def test_options_that_make_no_sense(fakes: list[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    result = sweep(tmp_path, *(argument.replace("PAIRS", str(pairs)) for argument in arguments))
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert fakes == []


def test_calibrated_types_need_calibration(tmp_path: Path) -> None:
    result = sweep(tmp_path, types="F16,gptq:4x64")
    assert isinstance(result.exception, InputError) and "--calibration" in str(result.exception)


# --- which pairs ---------------------------------------------------------------------------------------------


def test_a_sample_is_spread_and_the_larger_holds_the_smaller(tmp_path: Path) -> None:
    suite = f"pairs:{write_pairs(tmp_path / 'pairs.jsonl', 300)}"
    small, large = (load_work(suite, sample=count) for count in (30, 90))
    assert len(small.pairs) == 30 and {p.id for p in small.pairs} < {p.id for p in large.pairs}
    numbers = [int(str(pair.id)[1:]) for pair in small.pairs]
    assert numbers == sorted(numbers) and max(numbers) > 200  # in the file's order, from all over it
    assert small.to_json()["sample"] == 30 and small.to_json()["pairs_sha256"] != large.to_json()["pairs_sha256"]


def test_samples_of_each_suite(fakes: list[str], tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    suites = ["--suite", f"pairs:{pairs}", "--suite", f"pairs/y:{pairs}"]
    rows = lines_of(sweep(tmp_path, *suites, "--sample", "12,4", types="F16,Q8_0"))
    counts = {(row["suite"], row["type"]): row["pairs"] for row in rows}
    assert counts["pairs", "Q8_0"] == 12 and counts["pairs-y", "Q8_0"] == 4 and counts["all suites", "Q8_0"] == 16


def test_a_subset_and_items_that_stay_whole(tmp_path: Path) -> None:
    items = [
        {"id": f"{domain}{i}", "prompt": "q", "domain": domain, "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
        for domain in ("chat", "safety-refuse", "safety-response")
        for i in range(4)
    ]
    path = tmp_path / "rmbench.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    work = load_work(f"rmbench/safety:{path}", 20)
    assert work.title == "rmbench/safety" and len(work.pairs) == 18
    assert {(pair.meta or {})["subset"] for pair in work.pairs} == {"safety-refuse"}
    assert len(load_work(f"rmbench/safety:{path}", sample=30).pairs) == 27
    items[5]["chosen"] = ["a", "b" * 50, "c"]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert len(load_work(f"rmbench:{path}", longest=40).pairs) == 11 * 9  # an item with one long response goes whole
    with pytest.raises(InputError, match="It has: chat, safety-refuse, safety-response"):
        load_work(f"rmbench/math:{path}")


# --- progress ------------------------------------------------------------------------------------------------


def test_the_estimate_counts_pairs_and_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("gramlite.bench.progress.time.monotonic", lambda: clock[0])
    progress = SweepProgress(types=3, pairs=10)
    assert progress.seconds_left() is None
    progress.start("F16")
    clock[0] += 60
    progress.made()
    progress.judge("autoj", 10)
    for _ in range(5):
        clock[0] += 2
        progress.show({}, None)
    assert progress.seconds_left() == pytest.approx(25 * 2 + 2 * 60)
    progress.judged(2.0)
    progress.finish("F16", None)
    assert progress.seconds_left() == pytest.approx(20 * 2 + 1 * 60)


# --- as a process --------------------------------------------------------------------------------------------


def start_sweep(folder: Path, types: str) -> subprocess.Popen[str]:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sweep_fakes; from gramlite.bench import variants\n"
        "variants.artifact_target = sweep_fakes.artifact_target\n"
        "from gramlite.cli import main; main()"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    arguments = [
        "bench",
        "sweep",
        folder / "ckpt",
        "--types",
        types,
        "--suite",
        f"pairs:{folder / 'pairs.jsonl'}",
        "-o",
        folder / "out",
    ]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_sweep_killed_anywhere_is_finished_by_the_same_command(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(tmp_path / "ckpt")
    write_pairs(tmp_path / "pairs.jsonl", 40)
    (checkpoint / "seconds").write_text("0.5")  # to make a type; a fortieth of it a row
    out = tmp_path / "out"
    process = start_sweep(tmp_path, "F16,Q8_0,Q3_K_M")
    wait_for(out / "sweep.json")
    time.sleep(0.3)  # amid the making of F16
    process.kill()
    process.communicate()
    process = start_sweep(tmp_path, "F16,Q8_0,Q3_K_M")
    wait_for_rows(out / "runs/pairs/F16", 8)  # amid its judging
    process.kill()
    process.communicate()
    process = start_sweep(tmp_path, "F16,Q8_0,Q3_K_M")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors  # for the type whose maker crashes
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["pairs"] for row in rows] == [40, 40, 0]
    assert "ended with exit code -6" in rows[2]["failure"]
    assert rows_without_times(out / "runs/pairs/F16") != []
    assert json.loads((out / "runs/pairs/F16/run.json").read_text())["kept"] >= 8
    assert len({row["id"] for row in rows_without_times(out / "runs/pairs/F16")}) == 40


def test_an_interrupt_says_how_to_go_on_and_leaves_no_maker(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(tmp_path / "ckpt")
    write_pairs(tmp_path / "pairs.jsonl", 40)
    (checkpoint / "seconds").write_text("30")
    process = start_sweep(tmp_path, "F16,Q8_0")
    wait_for(tmp_path / "out/sweep.json")
    time.sleep(0.5)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "type the same command to go on" in errors
    assert time.monotonic() - began < 10
    assert "Traceback" not in errors
    log = tmp_path / "out/log.txt"
    assert not log.exists() or "Traceback" not in log.read_text()
    assert not (tmp_path / "out/artifacts/F16.gguf").exists()


def test_two_sweeps_do_not_share_a_folder(fakes: list[str], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(str(tmp_path / "out/sweep.lock")):
        result = sweep(tmp_path)
    assert isinstance(result.exception, IntegrityError) and "another process" in str(result.exception)
