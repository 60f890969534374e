"""An output never replaces its own source or what is no artifact, and is refused before any work is done for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gramlite.errors import InputError
from gramlite.storage import check_output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "judge"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("place", ["models", "models/judge", "models/judge/out", "models/../models/judge", "link", "."])
def test_source_and_output_lie_apart(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(InputError, match="lie in one another"):
        check_output(tmp_path / place, [tmp_path / "other", source], force=True)
    check_output(tmp_path / "models" / "judge-gptq", [source])


def test_a_file_is_no_source_of_itself(source: Path) -> None:
    file = source / "f16.gguf"
    file.write_bytes(b"weights")
    with pytest.raises(InputError, match="lie in one another"):
        check_output(file, [file], force=True, file=True)
    with pytest.raises(InputError, match="lie in one another"):
        check_output(source, [file], force=True)
    check_output(source / "q4.gguf", [file], file=True)


def test_a_gguf_file_may_lie_in_its_checkpoint(source: Path) -> None:
    check_output(source / "judge.gguf", [source], file=True)
    (source / "judge.gguf").write_bytes(b"weights")
    check_output(source / "judge.gguf", [source], force=True, file=True)
    with pytest.raises(InputError, match="lie in one another"):
        check_output(source / "config.json", [source], force=True, file=True)


def test_only_an_artifact_is_replaced(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already exists"):
        check_output(source, [])
    manifest = {"format": "hf", "name": "judge", "files": {"config.json": "0"}}
    (source / "gramlite.json").write_text(json.dumps(manifest))
    check_output(source, [], force=True)
    with pytest.raises(InputError, match="holds judge/.*did not write there"):
        check_output(tmp_path / "models", [], force=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", [], force=True)


def test_a_file_and_a_folder_do_not_replace_each_other(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    with pytest.raises(InputError, match="is no folder"):
        check_output(file, [], force=True)
    with pytest.raises(InputError, match="is a folder"):
        check_output(source, [], force=True, file=True)
    check_output(file, [], force=True, file=True)
