from __future__ import annotations

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rows.test_rows import BAD_LINES

from gramlite.cli import COMMANDS, run
from gramlite.commands.doctor import check_cuda
from gramlite.runtime.machine import Gpu, Machine

HEAVY = ("llama_cpp", "torch", "onnxruntime", "transformers", "scipy", "matplotlib", "gguf")
PAIR = {"id": "p1", "prompt": "q", "response_a": "x", "response_b": "y"}


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def pairs_file(folder: Path, *rows: dict[str, Any] | bytes) -> Path:
    path = folder / "pairs.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gramlite", *map(str, arguments)]


def test_one_pair_from_options(scripted: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["judge", "--prompt", "q", "--a", "x", "--b", "y", "-m", str(scripted)]) == 0
    (row,) = lines_of(capfdbinary.readouterr().out.decode())
    assert row["verdict"] in ("A", "B") and 0 <= row["p_a"] <= 1
    assert {"id", "verdict", "p_a", "margin", "consistent", "reason", "flags", "orders", "model", "settings"} <= set(
        row
    )
    for order in row["orders"]:
        assert set(order) == {"order", "verdict", "p_a", "margin", "rationale", "forced", "votes", "tokens"}
        assert set(order["tokens"]) == {"prompt", "cached", "generated"}
    assert row["model"]["format"] == "scripted" and len(row["settings"]) == 12


def test_a_file_among_bad_rows(scripted: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    rows: list[dict[str, Any] | bytes] = [PAIR]
    for bad in BAD_LINES.values():
        rows += [bad, PAIR]
    assert len(BAD_LINES) >= 30
    assert run(["judge", str(pairs_file(tmp_path, *rows)), "-m", str(scripted), "--mode", "direct", "--json"]) == 5
    output = lines_of(capfdbinary.readouterr().out.decode())
    assert len(output) == 2 * len(BAD_LINES) + 1
    for number, row in enumerate(output, 1):
        assert row["line"] == number
        assert "sections" in row
        if number % 2:
            assert row["verdict"] in ("A", "B") and row["id"] == "p1"
        else:
            assert row["verdict"] is None and row["reason"].startswith(f"line {number}: ")


def test_standard_input_answers_row_by_row(scripted: Path) -> None:
    process = subprocess.Popen(
        command_line("judge", "-", "-m", scripted, "--mode", "direct"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    with process:
        for name in ("one", "two"):
            process.stdin.write(json.dumps(PAIR | {"id": name}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == name, "answered before the next row is sent"
        process.stdin.close()
    assert process.returncode == 0


def test_output_file_and_resume(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_file(tmp_path, PAIR, b"bad", PAIR | {"id": "p2"})
    output = tmp_path / "out.jsonl"
    base = ["judge", str(pairs), "-m", str(scripted), "-o", str(output)]
    assert run(base) == 5
    assert [row["id"] for row in lines_of(output.read_text())] == ["p1", None, "p2"]
    assert run(base) == 2, "an existing file is not overwritten"
    pairs_file(tmp_path, PAIR, PAIR | {"id": "p2"}, PAIR | {"id": "p3"})
    assert run([*base, "--resume"]) == 0
    assert sorted(row["id"] for row in lines_of(output.read_text())) == ["p1", "p2", "p3"]
    assert run([*base, "--resume", "--mode", "direct"]) == 6
    assert 'settings.mode: "think" → "direct"' in capsys.readouterr().err


def test_a_pair_from_options_resumes(scripted: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    output = tmp_path / "out.jsonl"
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(json.loads(scripted.read_text()) | {"seconds": 60}))

    def judge(text: str, *arguments: str, model: Path = scripted) -> int:
        return run(["judge", "--prompt", text, "--a", "x", "--b", "y", "-m", str(model), "-o", str(output), *arguments])

    assert judge("one", "--resume") == 0 and len(lines_of(output.read_text())) == 1
    whole = output.read_bytes()
    output.write_bytes(whole + b'{"torn')
    capfdbinary.readouterr()
    assert judge("one", "--resume") == 0 and output.read_bytes() == whole
    shown = capfdbinary.readouterr()
    assert not shown.out and b"from before" in shown.err
    assert judge("two", "--resume") == 0 and len(lines_of(output.read_text())) == 2
    assert output.read_bytes().startswith(whole) and len(lines_of(output.read_text())[1]["input"]) == 16
    assert judge("one", "--resume", "--mode", "direct") == 6
    began = time.monotonic()
    assert judge("three", model=slow) == 2 and b"already exists" in capfdbinary.readouterr().err
    assert time.monotonic() - began < 30, "an output that exists is refused before anything is judged"
    assert judge("one", "--force") == 0 and output.read_bytes() == whole


@pytest.mark.parametrize("name", ["judge", "one pair", "rank", "calibrate"])
@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 4), (errno.EROFS, 4), (errno.ENOSPC, 4), (errno.ENOTDIR, 1)]
)
def test_an_output_that_cannot_be_written_is_one_line(
    name: str,
    number: int,
    code: int,
    scripted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "locked" / "out.jsonl"
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path == output:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, mode, *arguments, **options)

    rows = [PAIR | {"id": str(n), "label": "AB"[n % 2], "completions": ["x", "y"]} for n in range(20)]
    pairs = str(pairs_file(tmp_path, *rows))
    command = {"one pair": ["judge", "--prompt", "q", "--a", "x", "--b", "y"]}.get(name, [name, pairs])
    monkeypatch.setattr(Path, "open", refuse)
    assert run([*command, "-m", str(scripted), "--mode", "direct", "-o", str(output)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {output}: {os.strerror(number)}. ")


def test_an_output_in_a_folder_that_is_none(scripted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    pairs = pairs_file(tmp_path, PAIR)
    assert run(["judge", str(pairs), "-m", str(scripted), "-o", str(tmp_path / "file" / "out.jsonl")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and str(tmp_path / "file") in line


@pytest.mark.parametrize("name", ["judge", "rank"])
def test_help_says_what_decodes_together(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "GGUF" in said[said.index("--parallel") :] and "hf and onnx judge one at a time" in said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["judge"], 2, "Nothing to judge"),
        (["judge", "--prompt", "q"], 2, "all three"),
        (["judge", "x.jsonl", "--prompt", "q", "--a", "x", "--b", "y"], 2, "all three"),
        (["judge", "none.jsonl", "-m", "SCRIPTED"], 2, "no file none.jsonl"),
        (["judge", "-", "-m", "none.gguf"], 2, "no model at none.gguf"),
        (["judge", "-", "--mode", "guess"], 2, "think"),
        (["judge", "-", "--resume"], 2, "-o OUT.jsonl"),
        (["judge", "-", "--votes", "3", "--mode", "direct"], 2, "direct mode writes none"),
        (["judge", "-", "-m", "SCRIPTED", "--template", "none.txt"], 3, "neither built in"),
        (["inspect", "none.gguf"], 3, "no model at"),
        (["nonsense"], 2, "No such command"),
        (["judge", "--nonsense"], 2, "No such option"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], code: int, says: str, scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(scripted) if argument == "SCRIPTED" else argument for argument in arguments]) == code
    output = capsys.readouterr()
    assert says in output.err and "Traceback" not in output.err and not output.out


def test_flags_accept_underscores(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("{question} {response_a} {response_b}")
    assert run(["judge", "--prompt", "q", "--a", "x", "--b", "y", "-m", str(scripted), "--trust_template"]) == 0


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in COMMANDS)], ids=lambda names: "-".join(names) or "gramlite"
)
def test_help_is_quick_and_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom gramlite.cli import run\n"
        f"assert run({[*arguments, '--help']!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stderr.strip() == "[]" and "Usage:" in finished.stdout


def test_importing_gramlite_loads_nothing_heavy() -> None:
    code = f"import gramlite, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_closed_pipe_leaves_no_traceback(scripted: Path, tmp_path: Path) -> None:
    pairs = pairs_file(tmp_path, *[PAIR] * 3000)
    command = f"{' '.join(command_line('judge', pairs, '-m', scripted, '--mode', 'direct', '--json'))} | head -n 1"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert json.loads(finished.stdout)["id"] == "p1" and finished.stderr == ""


def test_an_interrupt_commits_and_says_how_to_go_on(tmp_path: Path, scripted: Path) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(json.loads(scripted.read_text()) | {"seconds": 0.05}))
    pairs = pairs_file(tmp_path, *[PAIR | {"id": str(n)} for n in range(500)])
    output = tmp_path / "out.jsonl"
    # a process started in the background ignores SIGINT, and so do its children until they say otherwise
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    arguments = ["judge", str(pairs), "-m", str(slow), "-o", str(output)]
    code = f"{listening}; from gramlite.cli import main; main({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not output.exists() or output.stat().st_size < 2000:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 2
    assert "Traceback" not in errors and "--resume" in errors
    rows = lines_of(output.read_text())
    assert rows and f"{len(rows)} rows are in" in errors


def test_a_terminal_shows_words_and_no_control_characters(tmp_path: Path, scripted: Path) -> None:
    hostile = tmp_path / "hostile.json"
    script = json.loads(scripted.read_text()) | {"rationale": "Feedback:\n\x1b[31mred\x07\n</think>"}
    hostile.write_text(json.dumps(script))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command_line("judge", "--prompt", "q", "--a", "x", "--b", "y", "-m", hostile),
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "100"},
    )
    os.close(slave)
    seen = io.BytesIO()
    while True:
        try:
            seen.write(os.read(master, 4096))
        except OSError:
            break
    assert process.wait() == 0
    text = seen.getvalue().decode()
    assert "\x1b[31m" not in text and "\x07" not in text and "red" in text
    assert "is better (probability 0." in text and ("both orders agree" in text or "orders disagree" in text)


def test_doctor_reports_each_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    findings = {row["name"]: row for row in lines_of(capsys.readouterr().out)}
    assert {
        "gramlite",
        "machine",
        "gguf backend",
        "CUDA for gguf (llama.cpp)",
        "reference judge",
        "cache folder",
    } <= set(findings)
    assert findings["gguf backend"]["works"] and "0.3.36" in findings["gguf backend"]["says"]
    for name in ("CUDA for gguf (llama.cpp)", "CUDA for hf and gptq (torch)", "CUDA for onnx (onnxruntime)"):
        assert findings[name]["works"] or "pip install" in findings[name]["says"], "why not, and what to type"


def test_doctor_says_where_judging_runs_and_why() -> None:
    gpus = (Gpu("Small", 1 << 30, 8 << 30, 0), Gpu("Large", 6 << 30, 8 << 30, 1))
    found = check_cuda("CUDA", lambda: Machine(1 << 30, gpus), "pip install it")
    assert found.works and "judging runs on GPU 1, which has the most free memory" in found.says
    assert check_cuda("CUDA", lambda: Machine(1 << 30, gpus[:1]), "").says.endswith("GPU 0, where a model fits it")
    found = check_cuda("CUDA", lambda: Machine(1 << 30, (), "no device answers", driver=True), "pip install it")
    assert not found.works and "no device answers; judging runs on the CPU" in found.says
    assert found.says.endswith("NVIDIA's driver is installed, so type: pip install it")
