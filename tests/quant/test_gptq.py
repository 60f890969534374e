"""The whole GPTQ run: on tiny checkpoints of every family, and (slow) on the reference judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gramlite.quant import gptq
from gramlite.quant.calibration import Transcript, describe, write_transcripts
from gramlite.quant.decoder import read_tensor
from gramlite.quant.gptq import command, parse_exception, quantize_gptq
from gramlite.quant.report import QuantizationReport
from gramlite.quant.sensitivity import verdict_weights
from gramlite.quant.solve import GptqSettings, Order
from transformers import AutoModelForCausalLM

import gramlite
from gramlite.errors import GramliteError, InputError, ModelError, ResourceError
from gramlite.formats.artifact import read_manifest, verify_files
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gptq_folder import open_gptq

from .conftest import FAMILIES

Make = Callable[..., Path]
TEMPLATE = Path(gramlite.__file__).with_name("data") / "reference" / "prompt.txt"


def quantize(
    source: Path, output: Path, transcripts: list[Transcript], settings: GptqSettings, **options: Any
) -> QuantizationReport:
    calibration = describe(transcripts, tokens=10_000, seed=0, source="made up")
    return quantize_gptq(source, output, transcripts, settings, calibration=calibration, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_beats_round_to_nearest(
    family: str, make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    heard: list[tuple[str, int, int]] = []
    report = quantize(
        make_checkpoint(family), tmp_path / "out", transcripts, GptqSettings(group_size=32),
        progress=lambda *step: heard.append(step),
    )  # fmt: skip
    assert len(report.layers) == 14
    assert all(layer.error < layer.plain_error for layer in report.layers)
    assert report.to_json()["worse_than_plain"] == 0
    assert heard[:4] == [("Reading gradients", step, 4) for step in range(1, 5)]
    assert heard[4:] == [("Quantizing layers", 1, 2), ("Quantizing layers", 2, 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_holds_the_whole_model(
    family: str, make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    """At 8 bits the dequantized folder, put back into transformers, computes what the checkpoint does."""
    source = make_checkpoint(family)
    quantize(source, tmp_path / "out", transcripts, GptqSettings(bits=8, group_size=32))
    folder = open_gptq(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([transcripts[0].ids])
    with torch.inference_mode():
        before = model(ids).logits
        state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        for name in folder.linears:
            state[f"{name}.weight"] = torch.from_numpy(folder.read_linear(name).dequantize())
        for name in folder.tensors:
            if name in state:
                state[name] = torch.from_numpy(folder.read_float(name).copy())
        if model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        after = model(ids).logits
    assert (after - before).abs().max() < 0.02 * before.abs().max()


def test_sequential_layers_are_calibrated_on_quantized_ones(
    make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    source = make_checkpoint()
    codes = {}
    for sequential in (True, False):
        output = tmp_path / str(sequential)
        quantize(source, output, transcripts, GptqSettings(group_size=32, sequential=sequential))
        folder = open_gptq(output)
        codes[sequential] = [folder.read_linear(name).codes for name in folder.linears]
    names = folder.linears
    same = {name: np.array_equal(*pair) for name, pair in zip(names, zip(*codes.values(), strict=True), strict=True)}
    assert same["model.layers.0.self_attn.q_proj"]
    assert not same["model.layers.1.mlp.down_proj"]


def test_focus_weighs_tokens_by_their_gradient(
    make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    source, uniform = make_checkpoint(), lambda name, number: torch.ones(len(transcripts[number].ids))
    weigh = verdict_weights(open_checkpoint(source), transcripts)
    quantize(source, tmp_path / "focus", transcripts, GptqSettings(group_size=32))
    quantize(source, tmp_path / "weigh", transcripts, GptqSettings(group_size=32, focus=False), weigh=weigh)
    quantize(source, tmp_path / "plain", transcripts, GptqSettings(group_size=32, focus=False))
    quantize(source, tmp_path / "ones", transcripts, GptqSettings(group_size=32), weigh=uniform)
    weights = {path.name: (path / "model.safetensors").read_bytes() for path in tmp_path.iterdir() if path != source}
    assert weights["focus"] == weights["weigh"] != weights["plain"]
    assert weights["plain"] == weights["ones"]


def test_manifest_tells_how_it_was_made(make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path) -> None:
    report = quantize(make_checkpoint(), tmp_path / "out", transcripts, GptqSettings(group_size=16, order="full"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    verify_files(tmp_path / "out", manifest)
    assert (manifest.format, manifest.quantization) == ("gptq", "gptq:4x16")
    assert manifest.settings["order"] == "full"
    assert manifest.settings["layer_errors"]["model.layers.0.mlp.up_proj"] > 0
    assert manifest.calibration is not None
    assert manifest.calibration["transcripts"] == 12
    assert len(manifest.calibration["sha256"]) == 64
    assert manifest.bits_per_weight == report.bits_per_weight
    assert 4 < report.bits_per_weight < 16
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["desc_act"], config["sym"], config["group_size"]) == (True, True, 16)
    assert config == json.loads((tmp_path / "out/quantize_config.json").read_text())


def test_some_layers_take_other_bits(make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path) -> None:
    exceptions = (("v_proj", 8), ("layers.1.mlp", 2), ("down_proj", 3))
    settings = GptqSettings(group_size=32, symmetric=False, exceptions=exceptions)
    quantize(make_checkpoint(), tmp_path / "out", transcripts, settings)
    folder = open_gptq(tmp_path / "out")
    linears = {name.removeprefix("model.layers."): folder.read_linear(name) for name in folder.linears}
    expected = {"0.self_attn.v_proj": 8, "1.mlp.up_proj": 2, "1.mlp.down_proj": 3, "0.mlp.up_proj": 4}
    assert {name: linears[name].bits for name in expected} == expected
    assert linears["0.self_attn.v_proj"].symmetric
    assert not linears["0.mlp.up_proj"].symmetric
    dynamic = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["dynamic"]
    for name, linear in linears.items():
        fits = [rule["bits"] for pattern, rule in dynamic.items() if re.match(pattern[2:], f"model.layers.{name}")]
        assert (fits or [4])[0] == linear.bits


@pytest.mark.parametrize("text", ["v_proj", "=8", "v_proj=", "v_proj=four"])
def test_exceptions_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="PART=BITS"):
        parse_exception(text)


def test_the_same_twice(make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path) -> None:
    source = make_checkpoint()
    for name in ("one", "two"):
        quantize(source, tmp_path / name, transcripts, GptqSettings(group_size=32))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_refusals_leave_the_older_artifact_alone(
    make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    source, output = make_checkpoint(), tmp_path / "out"
    with pytest.raises(InputError, match="48 does not divide the 64 inputs of model.layers.0"):
        quantize(source, output, transcripts, GptqSettings(group_size=48))
    assert not output.exists()
    quantize(source, output, transcripts, GptqSettings(group_size=32))
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        quantize(source, output, transcripts, GptqSettings(group_size=32))
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut short"):
        quantize(source, output, transcripts, GptqSettings(group_size=32), force=True)
    assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-checkpoint", "out"]


def test_weights_that_float16_cannot_hold_are_refused(
    make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    source = make_checkpoint()
    from safetensors.torch import load_file, save_file

    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][0] = 1e6
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="'model.norm.weight' has values that float16"):
        quantize(source, tmp_path / "out", transcripts, GptqSettings(group_size=32))
    assert not (tmp_path / "out").exists()


def test_command_prints_one_object(make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path) -> None:
    source, file = make_checkpoint(), tmp_path / "transcripts.jsonl"
    write_transcripts(file, transcripts)
    arguments = [str(source), "-o", str(tmp_path / "out"), "--calibration", str(file), "--group-size", "32"]
    result = CliRunner().invoke(
        command, [*arguments, "--tokens", "300", "--device", "cpu", "--json"], catch_exceptions=False
    )
    figures = json.loads(result.stdout)
    assert figures["layers"] == 14
    assert figures["mean_error"] < figures["mean_plain_error"]
    assert figures["peak_bytes"] > 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.calibration is not None
    assert 200 < manifest.calibration["tokens"] <= 300


def test_command_hands_every_option_on(
    make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[GptqSettings, dict[str, Any]]] = []

    def stand_in(source: Path, output: Path, transcripts: Any, settings: GptqSettings, **options: Any) -> Any:
        used.append((settings, options))
        raise ModelError("enough")

    monkeypatch.setattr(gptq, "quantize_gptq", stand_in)
    file = tmp_path / "transcripts.jsonl"
    write_transcripts(file, transcripts)
    plain = [str(make_checkpoint()), "-o", str(tmp_path / "out"), "--calibration", str(file), "--device", "cpu"]
    others = ["--bits", "3", "--group-size", "32", "--asymmetric", "--no-focus"]
    exceptions = ["--bits-for", "v_proj=8", "--bits-for", "layers.0=2", "--template", str(TEMPLATE), "--force"]
    solving = ["--act-order", "full", "--damping", "0.05", "--no-sequential", "--no-search"]
    for arguments in (plain, plain + others + exceptions, [*plain, "--group-size", "-1", *solving]):
        assert isinstance(CliRunner().invoke(command, arguments).exception, ModelError)
    assert used[0][0] == GptqSettings()
    assert used[1][0] == GptqSettings(
        bits=3, group_size=32, symmetric=False, focus=False, exceptions=(("v_proj", 8), ("layers.0", 2))
    )
    assert used[1][1]["template"] == str(TEMPLATE)
    assert used[1][1]["force"]
    assert used[2][0] == GptqSettings(group_size=-1, order="full", damping=0.05, sequential=False, search=False)


def test_what_cannot_be_is_refused_before_pairs_are_judged(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "load_calibration", lambda *arguments, **options: pytest.fail("pairs were judged"))
    source, out = make_checkpoint(), tmp_path / "out"
    plain = [str(source), "-o", str(out), "--calibration", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]
    faults = {
        "fits no layer": ["--bits-for", "v_prj=8"],
        "does not divide": ["--group-size", "48"],
        "prompt": ["--template", "gram"],
    }
    for message, arguments in faults.items():
        error = CliRunner().invoke(command, plain + arguments).exception
        assert isinstance(error, GramliteError) and message in str(error)
    out.mkdir()
    error = CliRunner().invoke(command, plain).exception
    assert isinstance(error, InputError) and "already exists" in str(error)
    monkeypatch.setattr("gramlite.quant.packages.find_spec", lambda name: None)
    error = CliRunner().invoke(command, plain).exception
    assert isinstance(error, InputError) and "gramlite[gptq]" in str(error)


def test_too_little_memory_is_refused_with_numbers(
    make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gramlite.quant.memory.free_bytes", lambda device: 1 << 20)
    with pytest.raises(ResourceError, match=r"takes 0\.\d GB on cpu and 0\.\d GB are free"):
        quantize(make_checkpoint(), tmp_path / "out", transcripts, GptqSettings(group_size=32))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["static", "none", "full"])
def test_a_group_may_be_a_whole_row(
    order: Order, make_checkpoint: Make, transcripts: list[Transcript], tmp_path: Path
) -> None:
    report = quantize(make_checkpoint(), tmp_path / "out", transcripts, GptqSettings(group_size=-1, order=order))
    folder = open_gptq(tmp_path / "out")
    assert folder.config["quantization_config"]["group_size"] == -1
    for name in folder.linears:
        linear = folder.read_linear(name)
        assert linear.scales.shape[1] == 1 and linear.group_size == linear.codes.shape[1]
    assert np.mean([layer.error for layer in report.layers]) < np.mean([layer.plain_error for layer in report.layers])


@pytest.mark.slow
def test_reference_judge(tmp_path: Path) -> None:
    """Four of the reference judge's layers, from both ends, on real tokens."""
    from gramlite.quant.solve import factorize, relative_error, round_to_nearest, solve
    from gramlite.quant.stream import Stage, stream_decoder

    from gramlite.reference.files import build_checkpoint

    checkpoint = open_checkpoint(build_checkpoint(tmp_path / "reference"))
    draw = np.random.default_rng(0)
    texts = [Transcript(tuple(int(token) for token in draw.integers(100, 40_000, 300)), (), str(n)) for n in range(4)]
    ratios = []

    def visit(stage: Stage) -> None:
        for name in stage.linears:
            if name.split(".")[2] in ("0", "1", "28", "29"):
                weight = read_tensor(checkpoint, f"{name}.weight").float()
                quantized = solve(weight, factorize(stage.moment, GptqSettings()), GptqSettings())
                plain = relative_error(weight, round_to_nearest(weight, GptqSettings()), stage.moment)
                ratios.append(relative_error(weight, quantized, stage.moment) / plain)

    stream_decoder(checkpoint, texts, visit)
    assert len(ratios) == 28
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.5
