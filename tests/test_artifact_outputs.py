"""An artifact never replaces an input, a device or what gramlite did not make, with --force or without."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gramlite.cli import run
from gramlite.errors import GramliteError, InputError

overwriting = pytest.mark.fault("overwriting")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_file(path: Path, force: bool) -> None:
    from gramlite.formats.artifact import Manifest, hash_files
    from gramlite.formats.publish import publish_file
    from gramlite.storage import check_output

    place: Path = check_output(path, [], force=force, file=True) or path

    def build(temporary: Path) -> Manifest:
        temporary.write_bytes(b"new")
        return Manifest(format="gguf", name="judge", files={place.name: hash_files(temporary)[temporary.name]})

    publish_file(place, build, force=force, need_bytes=0)


@pytest.mark.parametrize(
    "kind",
    ["folder", *(pytest.param(kind, marks=overwriting) for kind in ("pipe", "device", "manifest", "manifest folder"))],
)
def test_a_file_of_weights_replaces_nobodys_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "judge"
    note = tmp_path / "judge.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/null")
        case "manifest":
            note.write_text('{"mine": 1}')
        case "manifest folder":
            note.mkdir()
            (note / "mine").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError):
            write_file(path, force)
    assert note.is_dir() == (kind == "manifest folder") and (kind != "manifest" or note.read_text() == '{"mine": 1}')
    assert sorted(each.name for each in tmp_path.rglob("*") if "tmp" in each.suffix or "old" in each.suffix) == []


@overwriting
def test_weights_behind_a_link_are_replaced_with_their_manifest(tmp_path: Path) -> None:
    from gramlite.formats.artifact import read_manifest, verify_files

    target, link = tmp_path / "store" / "v1.gguf", tmp_path / "latest.gguf"
    target.parent.mkdir()
    link.symlink_to(target)
    for force in (False, True):
        write_file(link, force)
        assert link.is_symlink() and target.read_bytes() == b"new"
        for path in (link, target):
            manifest = read_manifest(path)
            assert manifest is not None
            verify_files(path, manifest)
    (tmp_path / "latest.gguf.json").write_text(target.with_name("v1.gguf.json").read_text())
    with pytest.raises(InputError, match="is a link"):
        write_file(link, True)


def write_folder(path: Path, force: bool) -> None:
    from gramlite.formats.artifact import Manifest, hash_files, write_manifest
    from gramlite.storage import atomic_output

    with atomic_output(path, force=force) as folder:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text("new")
        write_manifest(folder, Manifest(format="hf", name="judge", files=hash_files(folder)))


@overwriting
def test_a_folder_is_replaced_where_gramlite_made_all_of_it(tmp_path: Path) -> None:
    made = tmp_path / "made"
    write_folder(made, False)
    write_folder(made, True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["made"]
    (made / "notes.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "gramlite.json").symlink_to(made / "gramlite.json")
    (tmp_path / "linked" / "mine").symlink_to(foreign)
    for folder in (made, foreign, tmp_path / "linked"):
        with pytest.raises(InputError, match="did not write there"):
            write_folder(folder, True)
    assert (made / "notes.txt").read_text() == "mine" and (foreign / "config.json").is_file()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["foreign", "linked", "made"]


@overwriting
def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    made, link = tmp_path / "made", tmp_path / "link"
    link.symlink_to(made)
    for force in (False, True):
        write_folder(link, force)
        assert link.is_symlink() and (made / "weights").read_text() == "new"


@overwriting
def test_a_note_does_not_take_a_folders_place(tmp_path: Path) -> None:
    from gramlite.storage import write_json

    folder = tmp_path / "note.json"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    with pytest.raises((GramliteError, OSError)):
        write_json(folder, {})
    assert (folder / "mine").read_text() == "mine"


@overwriting
def test_the_reference_judge_replaces_no_foreign_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert run(["reference", "checkpoint", "-o", str(tmp_path), "--force"]) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


@overwriting
@pytest.mark.parametrize(
    "command",
    [
        ["export", "gguf", "checkpoint"],
        ["quantize", "gguf", "checkpoint"],
        ["export", "adapter", "lora", "--base", "checkpoint"],
        ["quantize", "gguf", "checkpoint", "--calibration", "judge.gguf", "--type", "auto:4bpw"],
        ["quantize", "gguf", "checkpoint", "--imatrix", "judge.gguf"],
        ["pack", "checkpoint"],
        ["export", "gguf", "checkpoint", "--template", "judge.gguf"],
    ],
)
def test_a_models_files_and_settings_are_not_replaced(
    command: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("checkpoint", "lora"):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text('{"mine": 1}')
    named = next((option for option in ("--calibration", "--imatrix", "--template") if option in command), None)
    Path("judge.gguf").write_bytes(b"mine") if named else os.mkfifo("judge.gguf")
    for output in ("judge.gguf", "checkpoint/config"):
        assert run([*command, "-o", output, "--force"]) == 2
        assert output in capsys.readouterr().err
    assert json.loads(Path("checkpoint/config.json").read_text()) == {"mine": 1}
    assert Path("judge.gguf").is_fifo() if not named else Path("judge.gguf").read_bytes() == b"mine"


FOLDERS: dict[str, Callable[[], list[str]]] = {
    "onnx": lambda: ["export", "onnx", "checkpoint"],
    "merge": lambda: ["export", "merge", "checkpoint", "lora"],
    "quantized onnx": lambda: ["quantize", "onnx", "checkpoint"],
    "bnb": lambda: ["quantize", "bnb", "checkpoint"],
    "packed onnx": lambda: ["pack", "checkpoint", "--to", "onnx"],
}


@overwriting
@pytest.mark.parametrize("name", FOLDERS)
def test_force_replaces_no_foreign_checkpoint(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("checkpoint", "lora", "mine"):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text('{"mine": 1}')
    assert run([*FOLDERS[name](), "-o", "mine", "--force"]) == 2
    assert "did not write there" in capsys.readouterr().err
    assert json.loads(Path("mine/config.json").read_text()) == {"mine": 1}
