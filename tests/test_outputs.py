"""An output never replaces an input, a link, a device or what gramlite did not make, with --force or without."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gramlite.cli import run

PAIR = {"id": "1", "prompt": "What is 2+2?", "response_a": "4", "response_b": "5", "label": "A"}
ITEM = {"id": "1", "prompt": "What is 2+2?", "completions": ["4", "5"]}
overwriting = pytest.mark.fault("overwriting")


@pytest.fixture
def place(tmp_path: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with pairs, items to rank and a judge, which is where the command runs."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


COMMANDS: dict[str, list[str]] = {
    "judge": ["judge", "pairs.jsonl", "-m", "scripted.json"],
    "one pair": ["judge", "--prompt", "q", "--a", "1", "--b", "2", "-m", "scripted.json"],
    "rank": ["rank", "items.jsonl", "-m", "scripted.json"],
    "calibrate": ["calibrate", "pairs.jsonl", "-m", "scripted.json"],
}


def refused(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is refused in words, with --force, without and with --resume, and before the model is opened."""
    for more in ([], ["--force"], ["--resume"]):
        assert run([*arguments, "-o", str(output), *more, "--json"]) == 2
        said = capsys.readouterr()
        assert not said.out and str(output) in said.err and "Traceback" not in said.err


@overwriting
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_read_is_not_written(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = COMMANDS[name][1] if name != "one pair" else "scripted.json"
    os.link(read, "other-name")
    os.symlink(read, "link")
    before = Path(read).read_bytes()
    for output in (read, f"./{read}", "other-name", "link", "scripted.json"):
        refused(COMMANDS[name], Path(output), capsys)
    assert Path(read).read_bytes() == before == Path("other-name").read_bytes() and Path("link").is_symlink()


@overwriting
@pytest.mark.parametrize("option", ["--adapter", "--template"])
def test_an_adapter_and_a_template_are_inputs_too(option: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("named").write_text("{question} {response_a} {response_b}")
    refused([*COMMANDS["judge"], option, "named"], Path("named"), capsys)
    assert Path("named").read_text().startswith("{question}")


@overwriting
def test_what_lies_beside_the_model_is_not_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for beside in ("scripted.json.json", "scripted.json.calibration.json"):
        Path(beside).write_text("")
        refused(COMMANDS["judge"], Path(beside), capsys)


@overwriting
@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_a_socket_a_device_and_a_folder_stay(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    Path("folder").mkdir()
    Path("folder/mine").write_text("text")
    os.symlink("pipe", "to-pipe")
    os.symlink("loop", "loop")
    os.symlink("/dev/null", "device")  # itself it is not named: what is tested here could remove it
    for output in ("pipe", "socket", "folder", "to-pipe", "loop", "device"):
        refused(COMMANDS[name], Path(output), capsys)
    listener.close()
    assert Path("pipe").is_fifo() and Path("socket").is_socket() and Path("to-pipe").is_symlink()
    assert Path("folder/mine").read_text() == "text" and Path("device").is_char_device()


@overwriting
@pytest.mark.parametrize("stream", ["stdout", "stderr", "/dev/fd/1"])
@pytest.mark.parametrize("to_file", [True, False])
def test_the_standard_streams_are_no_files(stream: str, to_file: bool, place: Path) -> None:
    os.symlink("/dev/stdout", "stdout")
    os.symlink("/dev/stderr", "stderr")
    with Path("out").open("wb") as out:
        finished = subprocess.run(
            [sys.executable, "-m", "gramlite", *COMMANDS["judge"], "-o", stream, "--force"],
            stdout=out if to_file else subprocess.PIPE,
            stderr=subprocess.STDOUT if to_file else subprocess.PIPE,
        )
    said = Path("out").read_bytes() if to_file else finished.stderr
    assert finished.returncode == 2 and stream.encode() in said and b"Traceback" not in said


@overwriting
def test_standard_input_is_not_written(place: Path) -> None:
    before = Path("pairs.jsonl").read_bytes()
    with Path("pairs.jsonl").open("rb") as pairs:
        arguments = ["judge", "-", "-m", "scripted.json", "-o", "pairs.jsonl", "--force"]
        finished = subprocess.run([sys.executable, "-m", "gramlite", *arguments], stdin=pairs, capture_output=True)
    assert finished.returncode == 2 and Path("pairs.jsonl").read_bytes() == before


@overwriting
@pytest.mark.parametrize("name", ["judge", "rank"])
def test_a_link_is_followed_and_stays(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/rows.jsonl").write_text('{"old": 1}\n')
    os.link("elsewhere/rows.jsonl", "kept")
    os.symlink("elsewhere/rows.jsonl", "link.jsonl")
    os.symlink("elsewhere/new.jsonl", "dangling.jsonl")
    assert run([*COMMANDS[name], "-o", "link.jsonl"]) == 2 and "already exists" in capsys.readouterr().err
    for link, target in (("link.jsonl", "elsewhere/rows.jsonl"), ("dangling.jsonl", "elsewhere/new.jsonl")):
        assert run([*COMMANDS[name], "-o", link, "--force"]) == 0
        assert Path(link).is_symlink() and not Path(target).is_symlink()
        assert [json.loads(line)["id"] for line in Path(target).read_text().splitlines()] == ["1"]
        assert run([*COMMANDS[name], "-o", target, "--resume"]) == 0  # the same run by its other name
        assert len(Path(target).read_text().splitlines()) == 1
    assert Path("kept").read_text() == '{"old": 1}\n'  # a file is replaced as a whole, never emptied


@overwriting
@pytest.mark.parametrize("beside", ["rows.jsonl.run.json", "rows.jsonl.lock"])
@pytest.mark.parametrize("kind", ["text", "json", "folder", "pipe"])
def test_what_is_written_beside_rows_replaces_nobodys_file(
    beside: str, kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    match kind:
        case "text":
            Path(beside).write_text("mine")
        case "json":
            Path(beside).write_text('{"mine": 1}')
        case "folder":
            Path(beside).mkdir()
            (Path(beside) / "mine").write_text("mine")
        case "pipe":
            os.mkfifo(beside)
    kept = Path(beside).read_bytes() if kind in ("text", "json") else None
    assert run([*COMMANDS["judge"], "-o", "rows.jsonl", "--force"]) == 2
    assert beside in capsys.readouterr().err and not Path("rows.jsonl").exists()
    if kept:
        assert Path(beside).read_bytes() == kept
    elif kind == "folder":
        assert (Path(beside) / "mine").read_text() == "mine"


@overwriting
def test_pairs_that_are_called_like_a_record_stay(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("pairs.jsonl", "rows.jsonl.run.json")
    arguments = ["judge", "rows.jsonl.run.json", "-m", "scripted.json", "-o", "rows.jsonl"]
    assert run(arguments) == 2 and json.loads(Path("rows.jsonl.run.json").read_text()) == PAIR


def test_an_old_record_and_an_empty_lock_are_gramlites_own(place: Path) -> None:
    assert run([*COMMANDS["judge"], "-o", "rows.jsonl"]) == 0
    assert run([*COMMANDS["judge"], "-o", "rows.jsonl"]) == 2
    assert run([*COMMANDS["judge"], "-o", "rows.jsonl", "--force"]) == 0
    assert run([*COMMANDS["judge"], "-o", "rows.jsonl", "--resume"]) == 0


# --- benchmarks ----------------------------------------------------------------------------------------------


def bench_run(folder: str, *more: str) -> int:
    return run(["bench", "run", "pairs:pairs.jsonl", "-m", "scripted.json", "-o", folder, *more])


@overwriting
def test_a_run_folder_keeps_what_is_not_a_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/run.json").write_text('{"speed": 3}')
    assert bench_run("mine") == 2 and bench_run("mine", "--force") == 2
    assert json.loads(Path("mine/run.json").read_text()) == {"speed": 3}
    Path("rows").mkdir()
    shutil.copy("pairs.jsonl", "rows/rows.jsonl")
    assert bench_run("rows", "--force") == 2 and json.loads(Path("rows/rows.jsonl").read_text()) == PAIR
    Path("rows").rename("data")
    assert run(["bench", "run", "pairs:data/rows.jsonl", "-m", "scripted.json", "-o", "data", "--force"]) == 2
    assert json.loads(Path("data/rows.jsonl").read_text()) == PAIR
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def two_runs(place: Path) -> Path:
    assert bench_run("one") == 0 and bench_run("two") == 0
    return place


@overwriting
@pytest.mark.parametrize("ending", ["html", "md", "csv", "png", "svg"])
def test_a_report_replaces_no_input_and_nobodys_file(
    ending: str, two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(f"README.{ending}")
    mine.write_text("mine")
    assert run(["bench", "compare", "one", "two", "--report", "README.html"]) == 2
    assert mine.read_text() == "mine" and mine.name in capsys.readouterr().err
    assert [path.name for path in Path(".").glob("README.*")] == [mine.name]
    shutil.copy("one/rows.jsonl", f"run.{ending}")
    before = Path(f"run.{ending}").read_bytes()
    assert run(["bench", "compare", f"run.{ending}", "two", "--report", "run.html"]) == 2
    assert Path(f"run.{ending}").read_bytes() == before


@overwriting
def test_a_report_follows_links_and_refuses_pipes(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    compare = ["bench", "compare", "one", "two", "--report"]
    os.mkfifo("pipe.html")
    os.mkfifo("beside.md")
    os.mkfifo("plain")
    assert run([*compare, "pipe.html"]) == 2 and run([*compare, "beside.html"]) == 2
    assert run([*compare, "plain"]) == 2
    os.symlink("there.html", "link.html")
    for _ in range(2):  # its own report is replaced
        assert run([*compare, "link.html"]) == 0
        assert Path("link.html").is_symlink() and Path("there.html").read_text().startswith("<!doctype html>")


@overwriting
def test_a_gates_outcome_replaces_only_one(two_runs: Path) -> None:
    compare = ["bench", "compare", "one", "two", "--gate", "flips<=100", "--undecided", "pass", "--junit"]
    Path("mine.xml").write_text("<mine/>")
    assert run([*compare, "mine.xml"]) == 2 and Path("mine.xml").read_text() == "<mine/>"
    before = Path("two/rows.jsonl").read_bytes()
    assert run([*compare, "two/rows.jsonl"]) == 2 and Path("two/rows.jsonl").read_bytes() == before
    assert run([*compare, "out.xml"]) == 0 and run([*compare, "out.xml"]) == 0


def sweep(*more: str) -> int:
    Path("checkpoint").mkdir(exist_ok=True)
    Path("checkpoint/config.json").write_text("{}")
    arguments = ["bench", "sweep", "checkpoint", "--types", "F16=scripted.json", "--suite", "pairs:pairs.jsonl"]
    return run([*arguments, *more])


@overwriting
def test_a_sweep_takes_no_folder_of_somebody_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/artifacts").mkdir(parents=True)
    for name in ("results.csv", "artifacts/.notes.tmp", "log.txt"):
        (Path("mine") / name).write_text("mine")
    for more in ([], ["--force"]):
        assert sweep("-o", "mine", *more) == 2
        assert "other things than a sweep" in capsys.readouterr().err
    assert all((Path("mine") / name).read_text() == "mine" for name in ("results.csv", "artifacts/.notes.tmp"))
    assert sweep("-o", "pairs.jsonl", "--force") == 2 and json.loads(Path("pairs.jsonl").read_text()) == PAIR


@overwriting
@pytest.mark.parametrize("mine", ["page.md", "page.svg", "pairs.jsonl"])
def test_a_sweeps_page_replaces_nobodys_file(mine: str, place: Path) -> None:
    if mine != "pairs.jsonl":
        Path(mine).write_text("mine")
    before = Path(mine).read_bytes()
    assert sweep("-o", "swept", "--page", mine if mine == "pairs.jsonl" else "page.md") == 2
    assert Path(mine).read_bytes() == before and not Path("swept").exists()


@overwriting
def test_a_picture_beside_a_page_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from gramlite.bench import sweep_page

    mine = tmp_path / "page.png"
    mine.write_bytes(b"mine")
    monkeypatch.setattr(sweep_page, "panels_of", lambda *runs: [])
    base = SimpleNamespace(name="base")
    swept: Any = SimpleNamespace(comparisons={"suite": {}}, runs_of=lambda suite: {"base": base}, base=base)
    plan: Any = SimpleNamespace(source=SimpleNamespace(checkpoint=tmp_path))
    monkeypatch.setattr(sweep_page, "what_it_says", lambda swept: [])
    for sentence in ("mode_sentence", "settings_sentence"):
        monkeypatch.setattr(sweep_page, sentence, lambda plan: "", raising=False)
    monkeypatch.setattr(sweep_page, "tables_markdown", lambda swept: [])
    monkeypatch.setattr(sweep_page, "made_with", lambda plan, swept: [])
    sweep_page.write_page(tmp_path / "page.md", plan, swept)
    assert mine.read_bytes() == b"mine" and (tmp_path / "page.md").is_file()
