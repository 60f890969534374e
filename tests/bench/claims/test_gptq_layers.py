"""Layer errors of GPTQ folders, against the same figure from hooks on the whole model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="layers are run in torch: pip install 'gramlite[gptq]'")
pytest.importorskip("transformers", reason="needs the models of transformers: pip install 'gramlite[gptq]'")

import torch
import transformers
from gptq_layers import command, layer_errors
from gramlite.quant.calibration import Transcript, describe, write_transcripts
from gramlite.quant.gptq import quantize_gptq
from gramlite.quant.solve import GptqSettings

from gramlite.errors import InputError
from gramlite.formats.gptq_folder import open_gptq


def transcripts() -> list[Transcript]:
    draw = random.Random(5)
    start = tuple(range(20))
    drawn = [tuple(draw.randrange(64) for _ in range(30 + 4 * number)) for number in range(6)]
    return [Transcript(start + ids, (7 + 2 * (number % 2),), str(number)) for number, ids in enumerate(drawn)]


def make_checkpoint(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 1}
    config = transformers.LlamaConfig(**(sizes | heads | changes))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Path, list[Path]]:
    source, used = make_checkpoint(tmp_path / "source"), transcripts()
    folders = []
    for bits in (8, 4):
        folders.append(tmp_path / f"bits{bits}")
        settings = GptqSettings(bits=bits, group_size=32)
        quantize_gptq(
            source, folders[-1], used, settings, calibration=describe(used, tokens=1000, seed=0, source="made up")
        )
    return source, folders


def watched(source: Path, folder: Path, used: list[Transcript]) -> dict[str, float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    opened = open_gptq(folder)
    lost: dict[str, Any] = {}
    whole: dict[str, Any] = {}

    def hook(name: str) -> Any:
        changed = torch.from_numpy(opened.read_linear(name).dequantize())

        def add(module: Any, inputs: Any, output: Any) -> None:
            exact, other = inputs[0] @ module.weight.T, inputs[0] @ changed.T
            lost[name] = lost.get(name, 0) + (exact - other).square().sum()
            whole[name] = whole.get(name, 0) + exact.square().sum()

        return add

    for name in opened.linears:
        model.get_submodule(name).register_forward_hook(hook(name))
    with torch.inference_mode():
        for transcript in used:
            model(torch.tensor([transcript.ids]))
    return {name: float(lost[name] / whole[name]) for name in lost}


def test_errors_are_those_of_the_outputs(quantized: tuple[Path, list[Path]]) -> None:
    source, folders = quantized
    errors = layer_errors(source, folders, transcripts())
    for folder in folders:
        expected = watched(source, folder, transcripts())
        assert errors[folder].keys() == expected.keys()
        assert errors[folder] == pytest.approx(expected, rel=1e-3)
    assert all(errors[folders[0]][name] < 0.1 * error for name, error in errors[folders[1]].items())


def test_command_prints_an_object_a_folder(quantized: tuple[Path, list[Path]], tmp_path: Path) -> None:
    source, folders = quantized
    write_transcripts(tmp_path / "pairs.jsonl", transcripts())
    arguments = [str(source), *map(str, folders), "--pairs", str(tmp_path / "pairs.jsonl")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["of_first"], first["better_than_first"], first["layers"]) == (1.0, 0, 14)
    assert second["of_first"] == pytest.approx(second["mean_error"] / first["mean_error"])
    assert second["of_first"] > 10
    assert first["tokens"] == sum(len(transcript.ids) for transcript in transcripts())
    with_each = CliRunner().invoke(command, [*arguments, "--each"], catch_exceptions=False)
    errors = json.loads(with_each.stdout.splitlines()[1])["errors"]
    assert errors[second["worst_layer"]] == max(errors.values()) == second["worst_error"]


def test_a_folder_of_another_checkpoint_is_refused(quantized: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _, folders = quantized
    with pytest.raises(InputError, match="not of the checkpoint"):
        layer_errors(make_checkpoint(tmp_path / "deeper", num_hidden_layers=3), folders, transcripts())
    with pytest.raises(InputError, match="another shape"):
        layer_errors(make_checkpoint(tmp_path / "wider", intermediate_size=128), folders, transcripts())
