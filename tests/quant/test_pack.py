"""Packed weights are the GPTQ folder's own, bit for bit, and llama.cpp computes with them what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gramlite.export.smoke import smoke_judge
from gramlite.quant.calibration import Transcript, describe
from gramlite.quant.decoder import read_tensor
from gramlite.quant.gptq import linear_names, quantize_gptq
from gramlite.quant.pack import command, pack_gguf
from gramlite.quant.solve import GptqSettings, round_to_nearest

from gramlite.backends.gptq import open_on_cuda, packed, twin_path
from gramlite.errors import CannotRunHere, InputError, ModelError
from gramlite.formats.architecture import expected_tensors, read_architecture
from gramlite.formats.artifact import Artifact, artifact_sha256, hash_files, read_manifest, verify_files, write_manifest
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gguf_blocks import gguf_blocks, gguf_type, matmul_nbits
from gramlite.formats.gptq_folder import GptqWriter, open_gptq
from gramlite.formats.quantized_linear import QuantizedLinear
from gramlite.formats.tensor_stream import permute_heads
from gramlite.runtime.options import RuntimeOptions

from ..export.conftest import checkpoint_of, last_logits  # noqa: F401
from .test_gptq_folder import random_linear

FAMILIES = ("llama3.1", "llama-tied", "llama-untied", "qwen2", "qwen3")
KINDS = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True)}


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(0, 600, count)]


def quantize(source: Path, output: Path, settings: GptqSettings) -> Path:
    transcripts = [Transcript(tuple(tokens(200)), (1,), "one"), Transcript(tuple(tokens(90)), (2,), "two")]
    calibration = describe(transcripts, tokens=1000, seed=0, source="made up")
    quantize_gptq(source, output, transcripts, settings, calibration=calibration)
    return output


def packed_tensors(path: Path) -> dict[str, Any]:
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def dequantized(tensor: Any) -> Any:
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type)


def assert_same_weights(folder: Path, path: Path, kind: str) -> int:
    """Compare every quantized layer; return how many there were."""
    source, tensors = open_gptq(folder), packed_tensors(path)
    architecture = read_architecture(source.config)
    expected = expected_tensors(architecture)
    for name in source.linears:
        target = expected[f"{name}.weight"]
        weight = source.read_linear(name).dequantize()
        if target.heads:
            weight = permute_heads(weight, target.heads, architecture.head_size)
        assert tensors[target.target].tensor_type.name == kind
        assert np.array_equal(dequantized(tensors[target.target]), weight), name
    return len(source.linears)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_bit_identical(
    family: str,
    kind: str,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    bits, symmetric = KINDS[kind]
    settings = GptqSettings(bits=bits, group_size=32, symmetric=symmetric)
    folder = quantize(checkpoint_of(family), tmp_path / "gptq", settings)
    manifest = pack_gguf(folder, tmp_path / "model.gguf")
    assert assert_same_weights(folder, tmp_path / "model.gguf", kind) == 14
    assert manifest.quantization == kind
    embedding = packed_tensors(tmp_path / "model.gguf")["token_embd.weight"]
    assert np.array_equal(dequantized(embedding), open_gptq(folder).read_float("model.embed_tokens.weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_the_dequantized_weights_do(
    family: str,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    last_logits: Callable[..., Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    source = checkpoint_of(family)
    folder = quantize(source, tmp_path / "gptq", GptqSettings(group_size=32, symmetric=False))
    pack_gguf(folder, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    gptq = open_gptq(folder)
    with torch.inference_mode():
        original = model(torch.tensor([tokens(100)])).logits[0, -1].numpy().copy()
        for name in gptq.linears:
            weight = gptq.read_linear(name).dequantize()
            model.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        wanted = model(torch.tensor([tokens(100)])).logits[0, -1].numpy()
    found = last_logits(tmp_path / "model.gguf", tokens(100))
    lost = np.linalg.norm(found - wanted)  # llama.cpp rounds activations to 8 bits
    assert lost < 0.2 * np.linalg.norm(wanted)
    assert lost < 0.7 * np.linalg.norm(original - wanted)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fewer_bits_fit_into_four(bits: int, symmetric: bool) -> None:
    import gguf

    linear = random_linear(bits)
    middle = np.full_like(linear.zeros, 1 << (bits - 1))
    linear = replace(linear, zeros=middle) if symmetric else replace(linear, scales=np.exp2(np.round(linear.scales)))
    kind = gguf_type("layer", linear)
    assert kind == ("Q4_0" if symmetric else "Q4_1")
    blocks = gguf_blocks(linear, kind)
    assert np.array_equal(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]), linear.dequantize())


def test_one_group_gives_several_blocks_the_same_scale() -> None:
    import gguf

    linear = random_linear(4, columns=192, group_size=96)
    linear = replace(linear, zeros=np.full_like(linear.zeros, 8))
    blocks = gguf_blocks(linear, "Q4_0").reshape(64, 6, 18)
    assert np.array_equal(blocks[:, 0, :2], blocks[:, 2, :2])
    assert not np.array_equal(blocks[:, 2, :2], blocks[:, 3, :2])
    back = gguf.dequantize(blocks.reshape(64, -1), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(back, linear.dequantize())


def reference_matmul_nbits(linear: QuantizedLinear, packed: dict[str, Any]) -> Any:
    """The operator's definition, written out element by element as onnxruntime's documentation has it."""
    rows, columns = linear.codes.shape
    groups = columns // linear.group_size
    weight = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            group, within = divmod(column, linear.group_size)
            if linear.bits == 8:
                code, zero = packed["B"][row, group, within], 128
                if "zero_points" in packed:
                    zero = packed["zero_points"][row, group]
            else:
                code = (packed["B"][row, group, within // 2] >> (4 * (within % 2))) & 15
                zero = 8
                if "zero_points" in packed:
                    zero = (packed["zero_points"][row, group // 2] >> (4 * (group % 2))) & 15
            weight[row, column] = (np.float32(code) - np.float32(zero)) * packed["scales"][row * groups + group]
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnx_inputs_stand_for_the_same_weights(bits: int, symmetric: bool) -> None:
    linear = random_linear(bits, rows=32, columns=96)
    if symmetric:
        linear = replace(linear, zeros=np.full_like(linear.zeros, 1 << (bits - 1)))
    packed = matmul_nbits("layer", linear)
    assert ("zero_points" in packed) is not symmetric
    assert packed["B"].shape == (32, 3, 32 * bits // 8)
    assert np.array_equal(reference_matmul_nbits(linear, packed), linear.dequantize())


def test_what_a_format_cannot_hold_is_refused_by_name() -> None:
    ordered = random_linear(4)
    with pytest.raises(ModelError, match=r"layer has its groups in activation order .*Quantize without"):
        gguf_type("layer", random_linear(4, shuffled=True))
    with pytest.raises(ModelError, match="groups of 16"):
        gguf_type("layer", random_linear(4, group_size=16))
    with pytest.raises(ModelError, match="no GGUF type"):
        gguf_type("layer", random_linear(8))
    with pytest.raises(ModelError, match="Q4_1, cannot hold"):
        gguf_type("layer", replace(ordered, scales=np.full_like(ordered.scales, 0.1), zeros=ordered.zeros | 1))
    with pytest.raises(ModelError, match="powers of two"):
        matmul_nbits("layer", random_linear(4, group_size=96))
    with pytest.raises(ModelError, match="3-bit"):
        matmul_nbits("layer", random_linear(3))
    with pytest.raises(ModelError, match="activation order"):
        matmul_nbits("layer", random_linear(4, shuffled=True))


def test_command_writes_a_manifest_that_keeps_the_origin(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = quantize(checkpoint_of("llama-tied"), tmp_path / "gptq", GptqSettings(group_size=32))
    output = tmp_path / "model.gguf"
    arguments = [str(folder), "--to", "gguf", "-o", str(output), "--embedding", "q8_0", "--json"]
    figures = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    assert figures["quantization"] == "Q4_0"
    assert 4.5 < figures["bits_per_weight"] < 8.5
    manifest = read_manifest(output)
    assert manifest is not None
    verify_files(output, manifest)
    assert manifest.settings["group_size"] == 32
    assert manifest.calibration is not None
    assert manifest.source["source"]["name"] == "llama-tied"
    assert manifest.source["files"]["model.safetensors"] == hash_files(folder)["model.safetensors"]
    whole = manifest.source["source"]["bytes"]
    assert figures["source_bytes"] == whole == (checkpoint_of("llama-tied") / "model.safetensors").stat().st_size
    assert figures["compression"] == pytest.approx(whole / output.stat().st_size, abs=0.001)
    assert packed_tensors(output)["token_embd.weight"].tensor_type.name == "Q8_0"
    with pytest.raises(InputError, match="already exists"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_damaged_folder_leaves_nothing_behind(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = quantize(checkpoint_of("qwen2"), tmp_path / "gptq", GptqSettings(group_size=32))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ModelError, match=r"gate_proj is \(96, 64\)"):
        pack_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


def stored_otherwise(folder: Path, settings: dict[str, Any]) -> None:
    """Zero points of a gptq folder as gptq_v2 stores them, under the label that it has."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    zeros = {name: words for name, words in tensors.items() if name.endswith(".qzeros")}
    assert all((words.view(np.uint32) == 0x77777777).all() for words in zeros.values())
    save_file(tensors | {name: words + 0x11111111 for name, words in zeros.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "gramlite.json").unlink()


@pytest.mark.fault("zero-points")
def test_zero_points_stored_otherwise_than_labelled_pack_and_judge_alike(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    folder = quantize(checkpoint_of("llama-tied"), tmp_path / "gptq", GptqSettings(group_size=32))
    pack_gguf(folder, tmp_path / "right.gguf")
    stored_otherwise(folder, {})
    pack_gguf(folder, tmp_path / "model.gguf")
    right, wrong = packed_tensors(tmp_path / "right.gguf"), packed_tensors(tmp_path / "model.gguf")
    twin = packed_tensors(packed(folder))
    for name, tensor in right.items():
        assert np.array_equal(dequantized(tensor), dequantized(wrong[name])), name
        assert np.array_equal(dequantized(tensor), dequantized(twin[name])), name
    with pytest.raises(ModelError, match="'gptq_v2' stores them, and says another"):
        open_on_cuda(Artifact(folder, "gptq", None), RuntimeOptions(device="cuda"))  # where gptqmodel goes by the label


@pytest.mark.fault("zero-points")
@pytest.mark.parametrize("words", [["pack", "--to", "gguf"], ["pack", "--to", "onnx"], ["judge", "--device", "cpu"]])
def test_zero_points_that_nobody_can_tell_are_refused_before_any_work(
    words: list[str],
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.numpy import load_file, save_file

    from gramlite.cli import run

    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    folder = quantize(checkpoint_of("llama-tied"), tmp_path / "gptq", GptqSettings(group_size=32))
    stored_otherwise(folder, {})
    tensors = load_file(folder / "model.safetensors")
    one = next(name for name in tensors if name.endswith(".qzeros"))
    save_file(tensors | {one: tensors[one] - 0x11111111}, folder / "model.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    tail = ["-o", str(tmp_path / "out")] if words[0] == "pack" else ["--prompt", "p", "--a", "a", "--b", "b"]
    model = [str(folder)] if words[0] == "pack" else ["-m", str(folder)]
    code = run([words[0], *model, *words[1:], *tail])
    told = capsys.readouterr().err
    assert code == ModelError.exit_code == 3 and "checkpoint_format" in told and "packing" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_not_what_its_manifest_says_is_not_packed(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = quantize(checkpoint_of("qwen2"), tmp_path / "gptq", GptqSettings(group_size=32))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="does not have the sha256 its manifest lists"):
        pack_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (GptqSettings(group_size=16), "groups of 16"),
        (GptqSettings(bits=8, group_size=32, symmetric=False), "8-bit codes with zero points"),
    ],
)
def test_a_folder_that_only_cuda_runs_is_kept(
    settings: GptqSettings,
    words: str,
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first pairs need GGUF on a machine without CUDA, and GGUF has no such layers."""
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gramlite.backends.gptq.no_cuda_reason", lambda: "no CUDA device answers")
    folder = quantize(checkpoint_of("qwen3"), tmp_path / "gptq", settings)
    with pytest.raises(CannotRunHere, match=words):
        pack_gguf(folder, tmp_path / "model.gguf")
    manifest = read_manifest(folder)
    assert manifest is not None
    told = smoke_judge(folder, manifest, [1.0] * 24, template="gramlite").smoke
    assert told is not None and words in told["skipped"]
    verify_files(folder, manifest)


def test_a_withdrawn_folder_leaves_no_twin_in_the_cache(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    folder = quantize(checkpoint_of("llama-tied"), tmp_path / "gptq", GptqSettings(group_size=32))
    manifest, twin = read_manifest(folder), packed(folder)
    assert manifest is not None and twin.exists()
    monkeypatch.setattr("gramlite.export.smoke.judge_margins", lambda *arguments: [float("nan")] * 24)
    with pytest.raises(ModelError, match="was not kept"):
        smoke_judge(folder, manifest, [1.0] * 24, template="gramlite")
    assert not folder.exists() and {path.suffix for path in twin.parent.iterdir()} == {".lock"}


def test_figures_in_the_manifest_do_not_pack_a_folder_again(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAMLITE_CACHE", str(tmp_path / "cache"))
    folder = quantize(checkpoint_of("llama-tied"), tmp_path / "gptq", GptqSettings(group_size=32))
    manifest, before = read_manifest(folder), twin_path(folder)
    assert manifest is not None
    write_manifest(folder, replace(manifest, smoke={"flips": 0}))
    assert twin_path(folder) == before
    write_manifest(folder, replace(manifest, template={"name": "other", "sha256": "…", "text": "…"}))
    assert twin_path(folder) != before, "the template is inside the packed file"
    assert artifact_sha256(folder) != artifact_sha256(folder, manifest=False)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_layers_of_the_reference_judge(symmetric: bool, tmp_path: Path) -> None:
    """Rounded without calibration, which is all that packing needs."""
    from gramlite.reference.files import build_checkpoint

    source = build_checkpoint(tmp_path / "reference")
    checkpoint = open_checkpoint(source)
    folder = tmp_path / "gptq"
    folder.mkdir()
    writer = GptqWriter(folder)
    settings = GptqSettings(symmetric=symmetric)
    names = linear_names(checkpoint)
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if module in names:
            writer.add_linear(module, round_to_nearest(read_tensor(checkpoint, name), settings))
        else:
            writer.add(name, read_tensor(checkpoint, name).half().numpy())
    writer.finish(checkpoint.config, {"quant_method": "gptq", "checkpoint_format": "gptq"}, source)
    pack_gguf(folder, tmp_path / "model.gguf")
    assert assert_same_weights(folder, tmp_path / "model.gguf", "Q4_0" if symmetric else "Q4_1") == 210
