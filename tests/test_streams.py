"""Readers that leave, closed streams, paths that are no UTF-8 and locales without any: words and exit codes, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

streams = pytest.mark.fault("streams")
PAIR = {"id": "p", "prompt": "Größe?", "response_a": "groß", "response_b": "klein", "label": "A"}
BYTES = b"\xff\xfe gr\xfc\xdf"  # a name in no encoding
POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
GRAMLITE = f"{sys.executable} -m gramlite"


@pytest.fixture
def place(tmp_path: Path, scripted: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR | {"id": f"p{n}"}) + "\n" for n in range(3)))
    item = {"id": "i", "prompt": "q", "completions": ["ä", "b", "c"]}
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    return tmp_path


def shell(command: str, place: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line in bash; the exit code is that of the first of its pipe."""
    line = f"{command.replace('gramlite', GRAMLITE, 1)}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", line], cwd=place, capture_output=True, env=os.environ | environment, timeout=120
    )


@streams
@pytest.mark.parametrize(
    "command, code",
    [
        ("gramlite judge pairs.jsonl -m scripted.json >&-", 1),
        ("gramlite judge pairs.jsonl -m scripted.json -o rows.jsonl >&-", 0),
        ("gramlite judge - -m scripted.json <&-", 2),
        ("gramlite judge pairs.jsonl -m scripted.json <&-", 0),
        ("gramlite judge missing.jsonl -m scripted.json 2>&-", 2),
        ("gramlite judge missing.jsonl -m scripted.json <&- >&- 2>&-", 2),
        ("gramlite inspect scripted.json 2>&-", 0),
        ("gramlite --help >&-", 1),
        ("gramlite rank items.jsonl -m scripted.json >&-", 1),
        ("gramlite bench run pairs:pairs.jsonl -m scripted.json -o run >&-", 1),
        ("gramlite judge missing.jsonl -m scripted.json 2>&1 | true", 2),
    ],
)
def test_closed_streams(command: str, code: int, place: Path) -> None:
    finished = shell(command, place)
    said = finished.stdout + finished.stderr
    assert finished.returncode == code and b"Traceback" not in said and b"Exception ignored" not in said
    assert code != 1 or b"is closed" in said
    if "-o rows.jsonl" in command:
        assert len((place / "rows.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "command", ["judge pairs.jsonl -m scripted.json", "rank items.jsonl -m scripted.json", "--help"]
)
def test_a_reader_that_leaves(command: str, place: Path) -> None:
    (place / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 500)
    (place / "items.jsonl").write_text((place / "items.jsonl").read_text() * 100)
    finished = shell(f"gramlite {command} | true", place)
    assert finished.returncode in (0, 1) and finished.stderr == b""


# --- names ---------------------------------------------------------------------------------------------------


def every_command(name: str) -> dict[str, list[str]]:
    """Commands whose files and folders all begin with a name."""
    return {
        "judge": ["judge", f"{name}/pairs.jsonl", "-m", f"{name}/scripted.json", "-o", f"{name}/rows.jsonl"],
        "resume": [
            "judge",
            f"{name}/pairs.jsonl",
            "-m",
            f"{name}/scripted.json",
            "-o",
            f"{name}/rows.jsonl",
            "--resume",
        ],
        "taken": ["judge", f"{name}/pairs.jsonl", "-m", f"{name}/scripted.json", "-o", f"{name}/rows.jsonl"],
        "rank": ["rank", f"{name}/items.jsonl", "-m", f"{name}/scripted.json"],
        "inspect": ["inspect", f"{name}/scripted.json"],
        "run": ["bench", "run", f"pairs:{name}/pairs.jsonl", "-m", f"{name}/scripted.json", "-o", f"{name}/run"],
        "compare": ["bench", "compare", f"{name}/run", f"{name}/rows.jsonl", "--report", f"{name}/report"],
        "speed": ["bench", "speed", "-m", f"{name}/scripted.json", "--limit", "2", "--repetitions", "1"],
        "sweep": [
            "bench",
            "sweep",
            f"{name}/none",
            "--types",
            "F16",
            "--suite",
            f"pairs:{name}/pairs.jsonl",
            "-o",
            f"{name}/s",
        ],
        "calibrate": ["calibrate", f"{name}/pairs.jsonl", "-m", f"{name}/scripted.json"],
        "export": ["export", "gguf", f"{name}/none", "-o", f"{name}/out.gguf"],
        "template": ["judge", f"{name}/pairs.jsonl", "-m", f"{name}/scripted.json", "--template", f"{name}/none"],
        "missing": ["judge", f"{name}/none", "-m", f"{name}/scripted.json"],
        "pack": ["pack", f"{name}/none", "-o", f"{name}/out.gguf"],
        "doctor": ["doctor"],
    }


CODES = {
    "taken": {2},
    "sweep": {2, 3},
    "calibrate": {2},
    "export": {2, 3},
    "template": {3},
    "missing": {2},
    "pack": {2, 3},
}


@streams
@pytest.mark.parametrize("locale", ["UTF-8", "POSIX"])
def test_names_that_are_no_utf8_with_every_command(locale: str, place: Path) -> None:
    pytest.importorskip("matplotlib")
    name = os.fsdecode(BYTES)
    (place / name).mkdir()
    for file in ("pairs.jsonl", "items.jsonl", "scripted.json"):
        shutil.copy(place / file, place / name / file)
    environment = os.environ | (POSIX if locale == "POSIX" else {})
    code = (
        "import json, os, sys\n"
        "from gramlite.cli import run, open_streams\n"
        "open_streams()\n"
        "for key, arguments in json.load(open('commands.json')).items():\n"
        "    print('::', key, run([os.fsdecode(each.encode('utf-8', 'surrogateescape')) for each in arguments]), flush=True)\n"
    )
    (place / "commands.json").write_text(json.dumps(every_command(name)))
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, timeout=300
    )
    assert b"Traceback" not in finished.stderr, finished.stderr.decode("utf-8", "replace")
    lines = finished.stdout.decode("utf-8").splitlines()
    found = {line.split()[1]: int(line.split()[2]) for line in lines if line.startswith("::")}
    for key in every_command(name):
        assert found[key] in CODES.get(key, {0}), key
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert os.fsencode(next(row["path"] for row in rows if "format" in row)) == BYTES + b"/scripted.json"
    assert os.fsencode(next(row["run"] for row in rows if "score" in row)) == BYTES + b"/run"
    record = json.loads((place / name / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["suite"]["path"].encode("utf-8", "surrogateescape").endswith(BYTES + b"/pairs.jsonl")
    row = json.loads((place / name / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["id"] == "p0" and row["verdict"] in ("A", "B")


@streams
def test_a_model_in_a_folder_without_a_name(place: Path, reference_q8: Path) -> None:
    """llama.cpp opens the bytes, and the file's manifest is checked, its hash kept."""
    folder = place / os.fsdecode(BYTES)
    folder.mkdir()
    os.link(reference_q8, folder / "judge.gguf") if reference_q8.stat().st_dev == folder.stat().st_dev else shutil.copy(
        reference_q8, folder / "judge.gguf"
    )
    command = f"gramlite judge pairs.jsonl -m {os.fsdecode(BYTES).replace(' ', chr(92) + ' ')}/judge.gguf --mode direct --device cpu"
    for environment in ({}, POSIX):
        finished = shell(command, place, **environment)
        assert finished.returncode == 0 and b"Traceback" not in finished.stderr, finished.stderr
        assert len(finished.stdout.decode("utf-8").splitlines()) == 3


@streams
def test_artifacts_are_written_under_any_name(tmp_path: Path) -> None:
    """The names in a manifest and in GGUF's metadata, which are to be UTF-8, are escaped or left out."""
    from gramlite.formats.artifact import Manifest, hash_files, read_manifest, verify_files, write_manifest

    folder = tmp_path / os.fsdecode(BYTES)
    folder.mkdir()
    (folder / os.fsdecode(b"\xffweights")).write_text("w")
    write_manifest(
        folder, Manifest(format="hf", name=folder.name, files=hash_files(folder), source={"name": folder.name})
    )
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.name == folder.name
    verify_files(folder, manifest)


@streams
def test_the_reference_judge_is_built_under_any_name(tmp_path: Path) -> None:
    from gramlite.cli import run
    from gramlite.formats.artifact import read_manifest, verify_files
    from gramlite.formats.gguf_header import read_header

    checkpoint = tmp_path / os.fsdecode(BYTES)
    assert run(["reference", "checkpoint", "-o", str(checkpoint)]) == 0
    output = tmp_path / os.fsdecode(b"judge\xff.gguf")
    assert run(["export", "gguf", str(checkpoint), "-o", str(output), "--no-smoke"]) == 0
    manifest = read_manifest(output)
    assert manifest is not None and read_header(output).metadata["general.name"].isascii()
    verify_files(output, manifest)


@streams
def test_texts_given_in_a_posix_locale(place: Path) -> None:
    command = "gramlite judge --prompt 'Größe?' --a 'groß' --b 'klein' -m scripted.json --mode direct --json"
    said = {}
    for name, environment in (("POSIX", POSIX), ("UTF-8", {"PYTHONUTF8": "1"})):
        finished = shell(command, place, **environment)
        assert finished.returncode == 0 and b"Traceback" not in finished.stderr, finished.stderr
        said[name] = json.loads(finished.stdout)
    assert said["POSIX"] == said["UTF-8"]


def test_texts_that_are_no_utf8_are_refused(place: Path) -> None:
    finished = shell("gramlite judge --prompt $'\\xff' --a 'a' --b 'b' -m scripted.json", place)
    assert finished.returncode == 2 and b"Traceback" not in finished.stderr and b"Error" in finished.stderr
