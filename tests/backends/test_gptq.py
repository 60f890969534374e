"""The gptq backend: packed once into the cache and run by llama.cpp, unless CUDA is there; every decision by fakes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="GPTQ folders are made in torch: pip install 'gramlite[gptq]'")
pytest.importorskip("transformers", reason="GPTQ folders are made in torch: pip install 'gramlite[gptq]'")

from gramlite.quant.pack import pack_gguf
from gramlite.quant.solve import GptqSettings

from gramlite.backends import gptq
from gramlite.backends.gguf import backend as gguf
from gramlite.errors import ModelError, ResourceError
from gramlite.formats.artifact import Artifact
from gramlite.loading import open_artifact
from gramlite.runtime.options import RuntimeOptions

from ..quant.test_pack import quantize
from .conftest import logits_of

CPU = RuntimeOptions(device="cpu", threads=1)  # tiny models gain nothing from more


@pytest.fixture(scope="module")
def folder(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(checkpoint_of("qwen3"), tmp_path_factory.mktemp("gptq") / "judge", GptqSettings(group_size=32))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(0, 600, count)]


def test_a_folder_is_packed_once_and_runs_as_its_twin(
    folder: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = open_artifact(folder)
    assert artifact.format == "gptq"
    found = []
    for _ in range(2):
        backend = gptq.open_artifact(artifact, CPU)
        assert backend.device == "cpu, packed as GGUF" and backend.metadata["quantization"] == "Q4_0"
        found.append(logits_of(backend, tokens(40))[0][0])
        backend.close()
    assert capsys.readouterr().err.count("for llama.cpp, this once") == 1
    pack_gguf(folder, tmp_path / "twin.gguf")
    twin = gguf.open_artifact(Artifact(tmp_path / "twin.gguf", "gguf", None), CPU)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], logits_of(twin, tokens(40))[0][0])
    twin.close()
    assert [path.suffix for path in sorted((cache / "gptq").iterdir())] == [".gguf", ".json", ".lock"]


def test_a_damaged_or_half_written_twin_is_packed_again(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gptq.packed(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (path.parent / f".{path.name}.dead.tmp").write_bytes(b"left by a process that was killed")
    assert gptq.packed(folder) == path and path.read_bytes() != data
    assert capsys.readouterr().err.count("this once") == 2 and not list(path.parent.glob(".*.tmp"))


def test_another_folder_gets_another_twin(folder: Path, cache: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(folder, tmp_path / "judge"))
    assert gptq.packed(other) == gptq.packed(folder), "the same files, wherever they lie"
    (other / "README.md").write_text("another card")
    assert gptq.packed(other) != gptq.packed(folder)


def test_many_ask_and_one_packs(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gptq.packed(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert capsys.readouterr().err.count("this once") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_named(folder: Path, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(ResourceError, match="Point GRAMLITE_CACHE"):
        gptq.packed(folder)


def test_a_cache_that_is_a_file_is_named(folder: Path, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(ResourceError, match=r"Point GRAMLITE_CACHE.*gramlite pack .* --to gguf"):
        gptq.packed(folder)


def test_a_folder_that_gguf_cannot_hold_is_refused(
    checkpoint_of: Callable[..., Path], cache: Path, tmp_path: Path
) -> None:
    narrow = quantize(checkpoint_of("qwen3"), tmp_path / "narrow", GptqSettings(group_size=16))
    with pytest.raises(ModelError, match="groups of 16"):
        gptq.open_artifact(open_artifact(narrow), CPU)
    assert not list((cache / "gptq").glob("*.gguf"))


class Opened:
    """Stands for a backend; `device` says which way it was opened."""

    def __init__(self, device: str) -> None:
        self.device = device


@pytest.mark.parametrize(
    ("asked", "reason", "on_cuda", "chosen"),
    [
        ("auto", None, "fits", "cuda"),
        ("cuda", None, "fits", "cuda"),
        ("cpu", None, "fits", "llama.cpp on cpu"),
        ("auto", "no CUDA device answers", "fits", "llama.cpp on auto"),
        ("cuda", "the package gptqmodel is not installed", "fits", "llama.cpp on cuda"),
        ("auto", None, "is full", "llama.cpp on auto"),
        ("cuda", None, "is full", "refused"),
        ("auto", None, "is unusable", "llama.cpp on auto"),
        ("cuda", None, "is unusable", "refused"),
    ],
)
def test_where_it_runs(
    asked: str,
    reason: str | None,
    on_cuda: str,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def open_on_cuda(artifact: Artifact, options: RuntimeOptions) -> Any:
        if on_cuda == "is full":
            raise ResourceError("the GPU is full.")
        if on_cuda == "is unusable":
            raise ModelError("transformers could not load it: the GPU is unusable.")
        return Opened("cuda")

    caplog.set_level(logging.INFO, logger="gramlite")
    monkeypatch.setattr(gptq, "no_cuda_reason", lambda: reason)
    monkeypatch.setattr(gptq, "open_on_cuda", open_on_cuda)
    monkeypatch.setattr(gptq, "packed", lambda folder: folder)
    monkeypatch.setattr(gguf, "open_artifact", lambda artifact, options: Opened(f"llama.cpp on {options.device}"))
    artifact, options = Artifact(tmp_path, "gptq", None), RuntimeOptions(device=asked)  # type: ignore[arg-type]
    if chosen == "refused":
        with pytest.raises((ResourceError, ModelError), match=f"the GPU {on_cuda}"):
            gptq.open_artifact(artifact, options)
        return
    assert gptq.open_artifact(artifact, options).device.removesuffix(", packed as GGUF") == chosen
    said = reason or (f"the GPU {on_cuda}" if on_cuda != "fits" else None)
    assert ("packed as GGUF: " in caplog.text and f"{said}." in caplog.text) == (asked != "cpu" and said is not None)
    assert any(record.levelno >= logging.WARNING for record in caplog.records) == (on_cuda != "fits")
