"""The hf backend on tiny random checkpoints: transformers' own logits, whatever is reused, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the hf backend needs torch: pip install 'gramlite[hf]'")
pytest.importorskip("transformers", reason="the hf backend needs transformers: pip install 'gramlite[hf]'")

import torch
import transformers
from safetensors.torch import load_file, save_file

import gramlite
from gramlite.backends.hf import HfBackend, machine, open_artifact
from gramlite.errors import GramliteError, InputError, ModelError, ResourceError
from gramlite.formats.artifact import Artifact
from gramlite.runtime.machine import Machine
from gramlite.runtime.options import PIECE, RuntimeOptions

from .conftest import logits_of

CPU = RuntimeOptions(device="cpu", threads=1)  # tiny models gain nothing from more
FAMILIES = ("llama3.1", "llama-tied", "qwen2", "qwen3")


def tokens(count: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 600, count)]


def opened(folder: Path, options: RuntimeOptions = CPU) -> HfBackend:
    return open_artifact(Artifact(folder, "hf", None), options)


def expected(folder: Path, ids: list[int]) -> Any:
    """transformers' logits at every position, in one pass without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_pass(family: str, checkpoint_of: Callable[..., Path]) -> None:
    folder = checkpoint_of(family)
    ids = tokens(90)
    wanted = expected(folder, ids)
    backend = opened(folder)
    found, cached = logits_of(backend, ids[:80], (30, 60), [ids[80:81], ids[81:90]])
    assert cached == 0
    for logits, position in zip(found, (79, 80, 89), strict=True):
        assert np.abs(logits - wanted[position]).max() < 1e-4
    again, cached = logits_of(backend, ids[:80], (30, 60))
    assert cached == 60 and np.array_equal(again[0], found[0]), "bit for bit"
    other = [*ids[:30], *tokens(20, seed=2)]
    third, cached = logits_of(backend, other, (30,))
    assert cached == 30 and np.abs(third[0] - expected(folder, other)[-1]).max() < 1e-4
    backend.close()


def test_half_precision_checkpoints_are_computed_in_float32_on_a_cpu(checkpoint_of: Callable[..., Path]) -> None:
    folder = checkpoint_of("qwen3", dtype="bfloat16")
    backend = opened(folder)
    assert backend.device == "cpu, float32" and backend.metadata["quantization"] == "BF16"
    found, _ = logits_of(backend, tokens(40))
    assert np.abs(found[0] - expected(folder, tokens(40))[-1]).max() < 1e-4


def test_what_does_not_fit_as_float32_keeps_its_type(
    checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gramlite.backends import hf

    folder = hf.read_model_folder(checkpoint_of("qwen3", dtype="bfloat16"))
    sizes = {"BF16": sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))}
    between = (hf.footprint(folder, sizes, 2).total(1) + hf.footprint(folder, sizes, 4).total(1)) // 2
    monkeypatch.setattr(hf, "machine", lambda: Machine(between))
    assert opened(folder.path, RuntimeOptions(device="cpu", context=16)).device == "cpu, bfloat16"
    monkeypatch.setattr(hf, "machine", lambda: Machine(1000))
    with pytest.raises(ResourceError, match="1,000 are free"):
        opened(folder.path)


def copy_of(folder: Path, destination: Path) -> Path:
    return Path(shutil.copytree(folder, destination))


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_broken_weights_are_refused_by_name(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint_of("llama-tied")
    short = copy_of(source, tmp_path / "short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="model.safetensors is refused: it is cut short"):
        opened(short)
    lacking = copy_of(source, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys, model\.layers\.1\.mlp\.up_proj\.weight"):
        opened(lacking)
    shapes = copy_of(source, tmp_path / "shapes")
    rewrite_config(shapes, intermediate_size=128)
    with pytest.raises(ModelError, match=r"mismatched keys, model\.layers\.0\.mlp"):
        opened(shapes)


def test_pickles_and_foreign_code_are_refused(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    pickled = copy_of(checkpoint_of("llama-tied"), tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle"):
        opened(pickled)
    foreign = copy_of(checkpoint_of("llama-tied"), tmp_path / "foreign")
    (foreign / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    evil = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    rewrite_config(foreign, auto_map=evil)
    opened(foreign).close()  # transformers' own class of that model type
    rewrite_config(foreign, auto_map=evil, model_type="evil")
    with pytest.raises(ModelError, match="transformers could not load"):
        opened(foreign)
    assert not (tmp_path / "ran").exists()


def test_other_refusals(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(checkpoint_of("llama-tied"), tmp_path / "model")
    with pytest.raises(InputError, match="export merge"):
        opened(folder, RuntimeOptions(device="cpu", adapter="lora.gguf"))
    with pytest.raises(InputError, match="trained for"):
        opened(folder, RuntimeOptions(device="cpu", context=1024))
    if not machine().gpus:
        with pytest.raises(ResourceError, match="--device cuda was asked for"):
            opened(folder, RuntimeOptions(device="cuda"))
    rewrite_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="quantized with 'awq'"):
        opened(folder)
    rewrite_config(folder, quantization_config=None, max_position_embeddings="many")
    with pytest.raises(ModelError, match="max_position_embeddings = 'many'"):
        opened(folder)


def test_abort_stops_a_long_prompt(checkpoint_of: Callable[..., Path]) -> None:
    backend = opened(checkpoint_of("llama-tied", max_position_embeddings=2 * PIECE))
    compute = backend._compute

    def stop_after_one(*arguments: Any) -> Any:
        backend.abort()
        return compute(*arguments)

    backend._compute = stop_after_one  # type: ignore[method-assign]
    with pytest.raises(GramliteError, match="stopped"):
        logits_of(backend, tokens(PIECE + 10))
    backend._compute = compute  # type: ignore[method-assign]
    assert np.isfinite(logits_of(backend, tokens(20))[0][0]).all()


def test_a_folder_without_a_manifest_opens_as_a_judge(
    checkpoint_of: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(checkpoint_of("llama-tied", max_position_embeddings=4096), tmp_path / "judge")
    packaged = Path(gramlite.__file__).parent / "data" / "reference" / "hf" / "chat_template.jinja"
    shutil.copy(packaged, folder / "chat_template.jinja")
    settings = gramlite.Settings(mode="direct")
    caplog.clear()
    with gramlite.load(folder, template="gramlite", settings=settings, runtime=replace(CPU, parallel=4)):
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert line.startswith("--parallel 4 changes nothing") and "one sequence at a time" in line
    caplog.clear()
    with gramlite.load(folder, template="gramlite", settings=settings, runtime=CPU) as judge:
        assert "--parallel" not in caplog.text
        verdict = judge(prompt="q", response_a="x", response_b="y")
        assert verdict.winner and judge.model["format"] == "hf" and judge.model["quantization"] == "F32"


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_checkpoint_is_quantized_while_it_is_loaded(
    kind: Any, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    for package in ("bitsandbytes", "accelerate"):
        pytest.importorskip(package, reason=f"--load-in needs {package}: pip install 'gramlite[bnb]'")
    from gramlite.quant.bnb import quantize_bnb

    folder, ids = checkpoint_of("llama-tied"), tokens(60)
    quantize_bnb(folder, tmp_path / kind, type=kind)
    asked = replace(CPU, load_in=kind)
    (found,), _ = logits_of(opened(folder, asked), ids)
    (stored,), _ = logits_of(opened(tmp_path / kind), ids)
    (full,), _ = logits_of(opened(folder), ids)
    assert opened(folder, asked).metadata["quantization"] == kind.upper()
    assert np.abs(found - stored).max() < 1e-3 < np.abs(found - full).max()
    with pytest.raises(InputError, match="quantized already"):
        opened(tmp_path / kind, asked)


def test_other_formats_refuse_to_be_quantized_while_loading(scripted: Path) -> None:
    with pytest.raises(InputError, match=r"scripted artifact.*Drop --load-in"):
        gramlite.load(scripted, runtime=RuntimeOptions(load_in="nf4"))


def test_the_record_says_what_was_loaded(tmp_path: Path) -> None:
    from gramlite.formats.artifact import Manifest
    from gramlite.loading import describe_model

    path = tmp_path / "m.json"
    path.write_text("{}")
    artifact = Artifact(path, "hf", Manifest(format="hf", name="m", quantization="BF16"))
    for options, quantization in ((CPU, "BF16"), (replace(CPU, load_in="nf4"), "NF4")):
        assert describe_model(artifact, {"quantization": "NF4"}, options)["quantization"] == quantization
