"""bitsandbytes folders of tiny checkpoints: what was saved reloads in a new process as it was, or is not written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'gramlite[bnb]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'gramlite[bnb]'")

from click.testing import CliRunner
from gramlite.quant import bnb
from gramlite.quant.bnb import command, last_logits, probe, quantize_bnb
from safetensors import SafetensorError

from gramlite.errors import InputError, ModelError, ResourceError
from gramlite.formats.artifact import Artifact, read_manifest, verify_files
from gramlite.loading import detect_format

from ..export.conftest import checkpoint_of  # noqa: F401


@pytest.mark.parametrize(("kind", "lost"), [("nf4", 0.4), pytest.param("int8", 0.1, marks=pytest.mark.slow)])
def test_a_folder_reloads_as_it_was(
    kind: str,
    lost: float,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source, output = checkpoint_of("qwen3", dtype="bfloat16"), tmp_path / "judge"
    figures = json.loads(
        CliRunner().invoke(command, [str(source), "-o", str(output), "--type", kind], catch_exceptions=False).stdout
    )
    manifest = read_manifest(output)
    assert manifest is not None
    verify_files(output, manifest)
    modes = {path.suffix: path.stat().st_mode for path in output.iterdir()}
    assert modes[".safetensors"] == modes[".json"], "who may read the configuration may read the weights"
    assert (manifest.format, manifest.quantization) == ("hf", kind.upper()) == ("hf", figures["quantization"])
    assert manifest.settings["reload_difference"] < 1e-4, "compared in a process of its own"
    assert detect_format(output, None) == "hf"
    tokens = probe(600)
    full, found = last_logits(source, tokens), last_logits(output, tokens)
    distance = np.linalg.norm(found - full) / np.linalg.norm(full)
    assert 1e-5 < distance < lost, "quantized, and still the same model"


def test_a_folder_that_reloads_otherwise_is_not_written(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = bnb.load_quantized

    def changed_after_saving(*arguments: Any) -> Any:
        model = load(*arguments)
        save = model.save_pretrained

        def save_and_change(folder: Path) -> None:
            save(folder)
            model.get_input_embeddings().weight.data.mul_(1.5)

        model.save_pretrained = save_and_change
        return model

    monkeypatch.setattr(bnb, "load_quantized", changed_after_saving)
    with pytest.raises(ModelError, match="reloads with logits that differ"):
        quantize_bnb(checkpoint_of("qwen3", dtype="bfloat16"), tmp_path / "judge")
    assert not list(tmp_path.iterdir())


def test_refusals(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    source = checkpoint_of("qwen3", dtype="bfloat16")
    with pytest.raises(InputError, match="no type 'fp3'"):
        quantize_bnb(source, tmp_path / "judge", type="fp3")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="already exists"):
        quantize_bnb(source, tmp_path / "taken")
    with pytest.raises(InputError, match="no folder"):
        quantize_bnb(tmp_path / "nothing", tmp_path / "judge")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def without(folder: Path, name: str, target: Path) -> Path:
    """A copy of a checkpoint that lacks a tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        save_file({key: value for key, value in load_file(file).items() if key != name}, file)
    return target


def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    whole = checkpoint_of("qwen3", dtype="bfloat16", tie_word_embeddings=False)
    source = without(whole, "lm_head.weight", tmp_path / "source")
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing"):
        quantize_bnb(source, tmp_path / "judge")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_said(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = bnb.load_quantized

    def on_a_full_disk(*arguments: Any) -> Any:
        model = load(*arguments)
        model.save_pretrained = fail
        return model

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(bnb, "load_quantized", on_a_full_disk)
    with pytest.raises(ResourceError, match="is full; judge was not written"):
        quantize_bnb(checkpoint_of("qwen3", dtype="bfloat16"), tmp_path / "judge")
    assert not list(tmp_path.iterdir())


def test_the_backend_computes_in_the_type_it_says(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    import torch

    from gramlite.backends.hf import open_artifact
    from gramlite.runtime.options import RuntimeOptions

    quantize_bnb(checkpoint_of("qwen3", dtype="bfloat16"), tmp_path / "judge")
    backend = open_artifact(Artifact(tmp_path / "judge", "hf", None), RuntimeOptions(device="cpu"))
    assert backend.metadata["quantization"] == "NF4" and backend.device == "cpu, float32"
    layers = [module for module in backend._model.modules() if hasattr(module, "compute_dtype")]
    assert layers and all(module.compute_dtype == torch.float32 for module in layers)
    backend.close()
