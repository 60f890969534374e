"""Fetching from the Hub: what is chosen, what is refused; the Hub itself is played by fakes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gramlite.cli import run
from gramlite.commands.pull import select
from gramlite.errors import InputError, ModelError

CHECKPOINT = {
    "config.json": 10,
    "model.safetensors": 1000,
    "pytorch_model.bin": 1000,
    "README.md": 5,
    "logo.png": 7,
    "tokenizer.json": 20,
    "original/params.json": 3,
}


def test_weights_tokenizer_and_card_are_chosen_and_pickles_left() -> None:
    chosen = select("owner/judge", "abc", CHECKPOINT, ())
    assert chosen.files == ("README.md", "config.json", "model.safetensors", "tokenizer.json")
    assert chosen.bytes == 1035


def test_one_of_several_gguf_files_must_be_named() -> None:
    sizes = {"judge.Q4_0.gguf": 4, "judge.Q8_0.gguf": 8, "README.md": 1}
    with pytest.raises(InputError, match="2 GGUF files"):
        select("owner/judge", "abc", sizes, ())
    assert select("owner/judge", "abc", sizes, ["judge.Q8_0.gguf"]).files == ("README.md", "judge.Q8_0.gguf")
    with pytest.raises(InputError, match=r"no file 'judge.Q2_K.gguf'"):
        select("owner/judge", "abc", sizes, ["judge.Q2_K.gguf"])


def test_a_repository_of_pickles_is_refused() -> None:
    with pytest.raises(ModelError, match="only pickles"):
        select("owner/judge", "abc", {"pytorch_model.bin": 9, "config.json": 1}, ())
    with pytest.raises(ModelError, match="no weights"):
        select("owner/judge", "abc", {"README.md": 9}, ())


class Hub:
    """A Hub with one repository, at one commit."""

    def __init__(self, fetch: Any) -> None:
        self.fetch = fetch

    def model_info(self, repository: str, **asked: Any) -> Any:
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in CHECKPOINT.items()]
        return SimpleNamespace(sha="c0ffee" * 6 + "abcd", siblings=files)


def test_the_command_fetches_one_commit_and_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def fetch(repository: str, **options: Any) -> None:
        asked.update(options)
        (options["local_dir"] / ".cache").mkdir()

    monkeypatch.setattr(hub, "HfApi", lambda: Hub(fetch))
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    folder = tmp_path / "judge"
    assert run(["pull", "owner/judge", "-o", str(folder)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert asked["revision"] == row["commit"] and "pytorch_model.bin" not in asked["allow_patterns"]
    assert row["command"].startswith("gramlite export gguf") and not (folder / ".cache").exists()


def test_without_a_network_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Nowhere:
        def model_info(self, *names: Any, **asked: Any) -> Any:
            raise OSError("the name of the host could not be resolved")

    monkeypatch.setattr(hub, "HfApi", Nowhere)
    assert run(["pull", "owner/judge", "-o", str(tmp_path / "judge")]) == 1
    assert "could not be fetched: the name of the host" in capsys.readouterr().err
    assert not (tmp_path / "judge").exists()


class Served:
    """A Hub whose one repository holds `files`; fetching them leaves what the Hub's own client leaves."""

    def __init__(self, files: dict[str, bytes], *, hashed: bool = False) -> None:
        self.files, self.hashed, self.fetched = files, hashed, list[str]()

    def model_info(self, repository: str, **asked: Any) -> Any:
        def entry(name: str, data: bytes) -> Any:
            lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if self.hashed else None
            return SimpleNamespace(rfilename=name, size=len(data), lfs=lfs)

        return SimpleNamespace(sha="c0ffee" * 6 + "abcd", siblings=[entry(*each) for each in self.files.items()])

    def fetch(self, repository: str, *, local_dir: Path, allow_patterns: list[str], **options: Any) -> None:
        for name in allow_patterns:
            note = local_dir / ".cache" / "huggingface" / "download" / f"{name}.metadata"
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text("etag")
            note.with_suffix(".incomplete").write_bytes(self.files[name])
            os.replace(note.with_suffix(".incomplete"), local_dir / name)
            self.fetched.append(name)

    def pull(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
        hub = pytest.importorskip("huggingface_hub")
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(hub, "snapshot_download", self.fetch)
        return run(["pull", "owner/judge", "-o", str(folder)])


FILES = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"card"}


@pytest.mark.fault("pull")
def test_a_cache_that_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    mine = [tmp_path / ".cache" / "mine", tmp_path / ".cache" / "huggingface" / "hub" / "model"]
    for path in mine:
        path.write_text("mine")
    assert Served(FILES).pull(monkeypatch, tmp_path) == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == FILES
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [".cache"]
    assert not (tmp_path / ".cache" / "huggingface" / "download").exists()


@pytest.mark.fault("pull")
@pytest.mark.parametrize("mine", [b"mine", b"mine, and longer"])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_that_is_there_is_not_replaced(
    mine: bytes, hashed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_bytes(mine)
    assert Served(FILES, hashed=hashed).pull(monkeypatch, tmp_path) == 2
    assert "README.md is there already" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_bytes() == mine and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("hashed", [True, False])
def test_the_same_command_again_changes_nothing(hashed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        served = Served(FILES, hashed=hashed)
        assert served.pull(monkeypatch, tmp_path) == 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    assert served.fetched == [] if hashed else sorted(FILES)


@pytest.mark.fault("pull")
def test_a_link_and_a_pipe_in_the_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert Served(FILES).pull(monkeypatch, tmp_path) == 2 and (tmp_path / "README.md").is_fifo()
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("nowhere")
    assert Served(FILES).pull(monkeypatch, tmp_path) == 2 and (tmp_path / "README.md").is_symlink()


@pytest.mark.fault("pull")
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("../model.safetensors", "/model.safetensors"):
        assert Served({name: b""}).pull(monkeypatch, tmp_path / "judge") == 3
    (tmp_path / "file").write_text("mine")
    assert Served(FILES).pull(monkeypatch, tmp_path / "file") == 2 and (tmp_path / "file").read_text() == "mine"
