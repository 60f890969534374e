"""Adapters and merged checkpoints judge their first pairs against one another; nothing that this takes is left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gramlite.export import adapter as adapter_module
from gramlite.export import merge as merge_module
from gramlite.export import smoke_lora

from gramlite.errors import ModelError
from gramlite.formats.artifact import read_manifest
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gguf_header import read_header

MakeAdapter = Callable[..., Path]
MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
MARGINS = [1.0, -2.0, 0.5, 3.0, -1.5, 0.8, -0.9, 2.0]
PACKAGED = Path(merge_module.__file__).parents[1] / "gramlite" / "data" / "reference"


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was judged with, in order; the adapter over its base is off by 0.1 nats."""
    calls: list[dict[str, Any]] = []

    def margins(
        model: Path, template: str | None = None, chat: Any = None, *, adapter: Path | None = None
    ) -> list[float]:
        assert template is not None and read_header(model).tensors
        if adapter:
            read_header(adapter, expect="adapter")
        text = Path(template).read_text(encoding="utf-8")
        calls.append({"adapter": adapter, "type": read_header(model).metadata["general.file_type"], "template": text})
        return [value + (0.1 if adapter else 0) for value in MARGINS]

    monkeypatch.setattr(smoke_lora, "judge_margins", margins)
    return calls


def run(kind: str, checkpoint: Path, folder: Path, output: Path, *words: str) -> Result:
    module, sources = {
        "adapter": (adapter_module, [str(folder), "--base", str(checkpoint)]),
        "merge": (merge_module, [str(checkpoint), str(folder)]),
    }[kind]
    return CliRunner().invoke(module.command, [*sources, "-o", str(output), "--template", "gramlite", *words])


@pytest.mark.parametrize("kind", ["adapter", "merge"])
def test_both_ways_are_compared(
    kind: str, judged: list[dict[str, Any]], checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    checkpoint, output = checkpoint_of("qwen2"), tmp_path / "out"
    folder = make_adapter(tmp_path / "peft", checkpoint, MODULES)
    result = run(kind, checkpoint, folder, output)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["smoke"]
    assert told["mean_margin_difference"] == pytest.approx(0.1) and told["flips"] == 0 and told["agreement"] == 1
    recorded = read_manifest(output)
    assert recorded is not None and recorded.smoke is not None and len(recorded.smoke["margins"]) == len(MARGINS)
    assert sorted(call["adapter"] is not None for call in judged) == [False, True]
    if kind == "adapter":
        assert judged[1]["adapter"] == output  # the very file that was written
    assert len({call["template"] for call in judged}) == 1 and "Response" in judged[0]["template"]
    assert {path.name for path in tmp_path.iterdir()} <= {"peft", "out", "out.json"}


@pytest.mark.parametrize("kind", ["adapter", "merge"])
def test_what_is_broken_is_not_kept(
    kind: str, checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def margins(
        model: Path, template: str | None = None, chat: Any = None, *, adapter: Path | None = None
    ) -> list[float]:
        return [math.nan] * 8 if (adapter is not None) == (kind == "adapter") else MARGINS

    monkeypatch.setattr(smoke_lora, "judge_margins", margins)
    checkpoint = checkpoint_of("qwen2")
    folder = make_adapter(tmp_path / "peft", checkpoint, MODULES)
    result = run(kind, checkpoint, folder, tmp_path / "out")
    assert isinstance(result.exception, ModelError) and "8 of 8 margins are no numbers" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
    assert run(kind, checkpoint, folder, tmp_path / "out", "--force").exit_code == 0
    assert run(kind, checkpoint, folder, tmp_path / "other", "--no-smoke").exit_code == 0


def test_an_adapter_may_be_written_into_its_own_folder(
    judged: list[dict[str, Any]], checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("qwen2")
    folder = make_adapter(tmp_path / "peft", checkpoint, MODULES)
    result = run("adapter", checkpoint, folder, folder / "judge.gguf")
    assert result.exit_code == 0 and json.loads(result.stdout)["smoke"]["flips"] == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["peft"] and len(list(folder.iterdir())) == 4


def test_a_base_without_weights_is_no_fault(tmp_path: Path) -> None:
    base = Path(shutil.copytree(PACKAGED / "hf", tmp_path / "base"))
    shutil.copy(PACKAGED / "adapter_model.safetensors", base)
    result = run("adapter", base, PACKAGED, tmp_path / "judge.lora.gguf")
    shutil.rmtree(base)
    assert result.exit_code == 0, result.output
    assert "holds no weights" in json.loads(result.stdout)["smoke"]["skipped"] and "warning" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"judge.lora.gguf{end}" for end in ("", ".json", ".NOTICE")}


def test_values_beyond_float16_are_judged_as_bfloat16(
    judged: list[dict[str, Any]], checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = Path(shutil.copytree(checkpoint_of("qwen2"), tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, checkpoint / "model.safetensors")
    folder = make_adapter(tmp_path / "peft", open_checkpoint(checkpoint).folder, MODULES)
    assert run("merge", checkpoint, folder, tmp_path / "merged").exit_code == 0
    assert [call["type"] for call in judged] == [32, 32]  # gguf.LlamaFileType.MOSTLY_BF16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merge"])
def test_the_reference_adapter_judges_alike_both_ways(kind: str, reference_base: Path, tmp_path: Path) -> None:
    result = run(kind, reference_base, PACKAGED, tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["smoke"]
    print(kind, told)
    assert (told["pairs"], told["flips"]) == (12, 0) and told["max_margin_difference"] < 0.2
