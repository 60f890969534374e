"""Fetching from the Hub: what is chosen, what is refused; the Hub itself is played by fakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gramlite.cli import run
from gramlite.commands.pull import select
from gramlite.errors import InputError, ModelError

CHECKPOINT = {"config.json": 10, "model.safetensors": 1000, "pytorch_model.bin": 1000, "README.md": 5, "logo.png": 7,
              "tokenizer.json": 20, "original/params.json": 3}  # fmt: skip


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
