"""ONNX folders of tiny checkpoints: transformers' logits, everything carried along, and refusals that leave nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai", reason="ONNX needs onnxruntime_genai: pip install 'gramlite[onnx]'")
pytest.importorskip("onnx", reason="ONNX needs onnx: pip install 'gramlite[onnx]'")
pytest.importorskip("onnx_ir", reason="ONNX needs onnx_ir: pip install 'gramlite[onnx]'")
pytest.importorskip("torch", reason="ONNX needs torch: pip install 'gramlite[onnx]'")
pytest.importorskip("transformers", reason="ONNX needs transformers: pip install 'gramlite[onnx]'")

import torch
import transformers
from click.testing import CliRunner
from gramlite.export import genai
from gramlite.export.onnx import command, export_onnx

from gramlite.backends.onnx import open_artifact
from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import Artifact, read_manifest, verify_files
from gramlite.loading import open_artifact as find_artifact
from gramlite.runtime.options import RuntimeOptions

from ..backends.conftest import logits_of

CPU = RuntimeOptions(device="cpu", threads=1)  # tiny models gain nothing from more


def tokens(count: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 600, count)]


def expected(folder: Path, ids: list[int]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def compare(source: Path, output: Path, allowed: float) -> None:
    """Logits after a prompt of several stretches and after single tokens, against one pass of transformers."""
    ids = tokens(200)
    wanted = expected(source, ids)
    backend = open_artifact(Artifact(output, "onnx", None), CPU)
    found, _ = logits_of(backend, ids[:190], (30, 120), [ids[190:191], ids[191:200]])
    for logits, position in zip(found, (189, 190, 199), strict=True):
        error = np.linalg.norm(logits - wanted[position]) / np.linalg.norm(wanted[position])
        assert error < allowed, position
    again, cached = logits_of(backend, ids[:190], (30, 120))
    assert cached == 120 and np.array_equal(again[0], found[0])
    backend.close()


def test_the_folder_is_whole_and_computes_what_transformers_does(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = checkpoint_of("llama3.1"), tmp_path / "judge"
    result = CliRunner().invoke(command, [str(source), "-o", str(output), "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["quantization"] == "F32"
    compare(source, output, 1e-4)
    names = {path.name for path in output.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "gramlite.json", "config.json"} <= names
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    artifact = find_artifact(output)
    assert artifact.format == "onnx" and artifact.manifest is not None
    assert set(artifact.manifest.files) == names - {"gramlite.json"}
    assert artifact.manifest.source["name"] == "llama3.1" and artifact.manifest.tools["onnxruntime-genai"][0].isdigit()
    assert artifact.manifest.bits_per_weight is not None and 32 <= artifact.manifest.bits_per_weight < 33
    with pytest.raises(InputError, match="already exists"):
        export_onnx(source, output)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "qwen2", "qwen3"])
def test_other_families(family: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint_of(family)
    export_onnx(source, tmp_path / "judge")
    compare(source, tmp_path / "judge", 1e-4)


@pytest.mark.slow
def test_half_precision_is_built_for_cuda(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    from gramlite.formats.onnx_graph import read_graph

    manifest = export_onnx(checkpoint_of("qwen3"), tmp_path / "judge", dtype="fp16")
    assert manifest.quantization == "F16" and manifest.settings["target"] == "cuda"
    assert read_graph(tmp_path / "judge" / "model.onnx").half


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-linear", "qwen2-yarn"])
def test_a_rope_scaling_that_the_builder_passes_over_is_never_written(
    family: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint_of(family)
    try:
        export_onnx(source, tmp_path / "judge")
    except ModelError as error:
        assert "rope scaling" in str(error) or "model builder failed" in str(error)
        assert not list(tmp_path.iterdir())
    else:
        compare(source, tmp_path / "judge", 1e-4)


def test_rotary_caches_that_differ_are_refused(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    angles, scaling = genai.rotary_angles(checkpoint_of("llama3.1"), 64)
    plain, _ = genai.rotary_angles(checkpoint_of("llama-tied"), 64)
    assert angles.shape == plain.shape and not np.allclose(angles, plain), "the scaling is one that shows"
    caches = {"cos_cache": np.cos(plain), "sin_cache": np.sin(plain)}
    monkeypatch.setattr(genai, "read_initializer", lambda path, name: caches[name] * scaling)
    with pytest.raises(ModelError, match="does not know this rope scaling"):
        genai.check_rope(checkpoint_of("llama3.1"), tmp_path / "model.onnx", half=False)
    genai.check_rope(checkpoint_of("llama-tied"), tmp_path / "model.onnx", half=False)


def test_refusals_leave_nothing_behind(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(checkpoint_of("qwen3"), tmp_path / "source"))
    output = tmp_path / "out" / "judge"
    with pytest.raises(InputError, match="no dtype 'fp8'"):
        export_onnx(source, output, dtype="fp8")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ModelError, match="'MambaForCausalLM' is unknown"):
        export_onnx(source, output)
    (source / "config.json").write_text(json.dumps(config))
    failing = ["-c", "import sys; print('Reading layer 0'); print('ValueError: no such thing'); sys.exit(1)"]
    run = genai.run
    monkeypatch.setattr(genai, "run", lambda command, advance, size: run([command[0], *failing], advance, size))
    with pytest.raises(ModelError, match="model builder failed: ValueError: no such thing"):
        export_onnx(source, output)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle"):
        export_onnx(source, output)
    assert not output.exists() and not list(output.parent.glob(".*"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(checkpoint_of("qwen3", tie_word_embeddings=False), tmp_path / "source"))
    for file in source.glob("*.safetensors"):
        save_file({key: value for key, value in load_file(file).items() if key != "lm_head.weight"}, file)
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing"):
        export_onnx(source, tmp_path / "judge")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "PACKAGES", ("onnx_of_tomorrow",))
    with pytest.raises(InputError, match=r"needs the package 'onnx_of_tomorrow'.*gramlite\[onnx\]"):
        genai.require_builder()


def test_the_template_is_recorded(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gramlite.export import onnx

    def fake_build(source: Path, folder: Path, *rest: Any) -> None:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"")

    monkeypatch.setattr(onnx, "build", fake_build)
    monkeypatch.setattr(onnx, "weight_bytes", lambda path: 1)
    export_onnx(checkpoint_of("qwen3"), tmp_path / "judge", template="gramlite")
    manifest = read_manifest(tmp_path / "judge")
    assert manifest is not None and manifest.template is not None
    assert manifest.template["name"] == "gramlite" and "{question}" in manifest.template["text"]
    verify_files(tmp_path / "judge", manifest)
