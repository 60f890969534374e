"""Weight-only ONNX folders, and GPTQ folders packed into ONNX bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime_genai", reason="ONNX needs onnxruntime_genai: pip install 'gramlite[onnx]'")
pytest.importorskip("onnx", reason="ONNX needs onnx: pip install 'gramlite[onnx]'")
pytest.importorskip("onnx_ir", reason="ONNX needs onnx_ir: pip install 'gramlite[onnx]'")
pytest.importorskip("transformers", reason="ONNX needs transformers: pip install 'gramlite[onnx]'")

import torch
import transformers
from click.testing import CliRunner
from gramlite.export.genai import initializers
from gramlite.quant.onnx import choose_method, command, quantize_onnx
from gramlite.quant.pack import command as pack_command
from gramlite.quant.pack_onnx import dequantize, pack_onnx, packed_nodes
from gramlite.quant.solve import GptqSettings

from gramlite.backends.onnx import open_artifact
from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import Artifact, read_manifest, verify_files
from gramlite.formats.gptq_folder import open_gptq
from gramlite.formats.onnx_graph import parse, read_values
from gramlite.runtime.options import RuntimeOptions
from gramlite.storage import sha256_file

from ..backends.conftest import logits_of
from ..export.conftest import checkpoint_of  # noqa: F401
from ..test_contract import make_gptq
from .test_pack import quantize

CPU = RuntimeOptions(device="cpu", threads=1)  # tiny models gain nothing from more


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(0, 600, count)]


def onnx_logits(folder: Path) -> Any:
    backend = open_artifact(Artifact(folder, "onnx", None), CPU)
    found, _ = logits_of(backend, tokens(100), (40,))
    backend.close()
    return found[0]


def torch_logits(source: Path, gptq: Path | None = None) -> Any:
    """transformers' logits of a checkpoint, its layers replaced by a GPTQ folder's dequantized ones where one is given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.inference_mode():
        if gptq:
            folder = open_gptq(gptq)
            for name in folder.linears:
                model.get_submodule(name).weight.copy_(torch.from_numpy(folder.read_linear(name).dequantize()))
        return model(torch.tensor([tokens(100)])).logits[0, -1].numpy()


def distance(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("kind", "family", "most"),
    [
        ("int8", "qwen3", 0.05),
        ("int4", "llama-tied", 0.5),
        pytest.param("int8", "llama-tied", 0.05, marks=pytest.mark.slow),
        pytest.param("int4", "qwen3", 0.5, marks=pytest.mark.slow),
    ],
)
def test_weights_are_quantized_and_the_model_is_the_same(
    kind: str,
    family: str,
    most: float,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source, output = checkpoint_of(family), tmp_path / "judge"
    arguments = [str(source), "-o", str(output), "--type", kind, "--json"]
    figures = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    manifest = read_manifest(output)
    assert manifest is not None
    verify_files(output, manifest)
    assert manifest.quantization == figures["quantization"] == kind.upper()
    assert manifest.settings["group_size"] == 32 and manifest.settings["target"] == "cpu"
    assert 1e-5 < distance(onnx_logits(output), torch_logits(source)) < most
    operators = [node.op_type for node in parse(output / "model.onnx").graph.node]
    assert operators.count("MatMulNBits") > 8 and "MatMul" not in operators
    assert manifest.settings["embedding"] == ("head" if family == "llama-tied" else "int8")
    assert "GatherBlockQuantized" in operators


def test_settings_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for wrong in ({"type": "int3"}, {"group_size": 48}, {"method": "magic"}, {"target": "tpu"}):
        with pytest.raises(InputError, match="There is no"):
            quantize_onnx(tmp_path, tmp_path / "judge", **wrong)  # type: ignore[arg-type]


def test_scales_are_searched_where_the_builder_can(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 64} | sizes  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert choose_method(tmp_path, "int4", 32, None) == choose_method(tmp_path, "int4", 32, "k_quant") == "k_quant"
    assert choose_method(tmp_path, "int4", 64, None) == "default", "192 are three groups of 64"
    assert choose_method(tmp_path, "int4", 256, None) == "default", "a group that is not full is one"
    assert choose_method(tmp_path, "int4", 64, "rtn") == "rtn"
    assert choose_method(tmp_path, "int8", 64, None) == "default"
    assert choose_method(tmp_path, "int8", 64, "k_quant") == "k_quant"
    with pytest.raises(InputError, match="Rows of 192 weights are an odd number of groups of 64"):
        choose_method(tmp_path, "int4", 64, "k_quant")
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 448, "intermediate_size": 512}))
    assert choose_method(tmp_path, "int4", 128, None) == "k_quant", "three and a half groups are four"


def assert_same_weights(gptq: Path, output: Path) -> int:
    """Compare every quantized layer of the folders, from their files alone; return how many there were."""
    folder, path = open_gptq(gptq), output / "model.onnx"
    tensors, compared = initializers(path), 0
    for entry in packed_nodes(folder, parse(path)):
        wanted = np.concatenate([folder.read_linear(name).dequantize() for name in entry.modules])
        assert np.array_equal(dequantize(entry, lambda name: read_values(path, tensors[name])), wanted), entry.modules
        compared += len(entry.modules)
    return compared


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama3.1", GptqSettings(group_size=32)),
        pytest.param("llama-tied", GptqSettings(group_size=32, symmetric=False), marks=pytest.mark.slow),
        pytest.param("llama-untied", GptqSettings(group_size=32, bits=8), marks=pytest.mark.slow),
        pytest.param("qwen2", GptqSettings(group_size=16, symmetric=False), marks=pytest.mark.slow),
        pytest.param("qwen3", GptqSettings(group_size=32, exceptions=(("v_proj", 8),)), marks=pytest.mark.slow),
        pytest.param("qwen3", GptqSettings(group_size=32, exceptions=(("layers.0", 8),)), marks=pytest.mark.slow),
    ],
)
def test_packed_weights_are_bit_identical_and_run(
    family: str,
    settings: GptqSettings,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = checkpoint_of(family)
    gptq = quantize(source, tmp_path / "gptq", settings)
    output = tmp_path / "packed"
    arguments = [str(gptq), "--to", "onnx", "-o", str(output), "--json"]
    CliRunner().invoke(pack_command, arguments, catch_exceptions=False)
    assert assert_same_weights(gptq, output) == 14
    manifest = read_manifest(output)
    assert manifest is not None and manifest.method == "gptq" and manifest.calibration is not None
    verify_files(output, manifest)
    assert manifest.source["files"]["model.safetensors"] == sha256_file(gptq / "model.safetensors")
    wanted, original = torch_logits(source, gptq), torch_logits(source)
    found = onnx_logits(output)  # onnxruntime rounds activations to 8 bits
    assert distance(found, wanted) < 0.1
    if settings.bits < 8:  # 8-bit weights cost no more than 8-bit activations
        assert distance(found, wanted) < 0.7 * distance(original, wanted)


@pytest.mark.parametrize("family", ["llama-tied", pytest.param("llama3.1", marks=pytest.mark.slow)])
def test_packed_embeddings_of_8_bits_run(
    family: str,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = checkpoint_of(family)
    gptq = quantize(source, tmp_path / "gptq", GptqSettings(group_size=16))
    arguments = [str(gptq), "--to", "onnx", "-o", str(tmp_path / "packed"), "--embedding", "q8_0", "--json"]
    CliRunner().invoke(pack_command, arguments, catch_exceptions=False)
    assert assert_same_weights(gptq, tmp_path / "packed") == 14
    manifest = read_manifest(tmp_path / "packed")
    assert manifest is not None and manifest.settings["embedding"] == "q8_0"
    verify_files(tmp_path / "packed", manifest)
    found, wanted = onnx_logits(tmp_path / "packed"), torch_logits(source, gptq)
    assert distance(found, wanted) < min(0.1, 0.7 * distance(torch_logits(source), wanted))


def test_what_the_operator_cannot_hold_is_refused_before_anything_is_built(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    gptq = quantize(checkpoint_of("qwen3"), tmp_path / "gptq", GptqSettings(group_size=32, bits=3))
    with pytest.raises(ModelError, match="3-bit codes"):
        pack_onnx(gptq, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


def test_a_folder_that_is_not_what_its_manifest_says_is_not_packed(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    gptq = quantize(checkpoint_of("qwen3"), tmp_path / "gptq", GptqSettings(group_size=32))
    weights = gptq / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="does not have the sha256 its manifest lists"):
        pack_onnx(gptq, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_layers_of_the_reference_judge(symmetric: bool, tmp_path: Path) -> None:
    """Rounded without calibration, which is all that packing needs."""
    from gramlite.reference.files import build_checkpoint

    make_gptq(build_checkpoint(tmp_path / "reference"), tmp_path / "gptq", bits=4, symmetric=symmetric)
    pack_onnx(tmp_path / "gptq", tmp_path / "packed")
    assert assert_same_weights(tmp_path / "gptq", tmp_path / "packed") == 210
