"""LoRA adapters as GGUF and merged into checkpoints: against transformers, against the reference judge, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from click.testing import CliRunner
from gramlite.export import adapter as adapter_module
from gramlite.export import merge as merge_module
from gramlite.export.adapter import export_adapter
from gramlite.export.gguf import export_gguf
from gramlite.export.merge import merge_adapter

from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import read_manifest, verify_files
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gguf_header import check_adapter_fits, read_header

MakeAdapter = Callable[..., Path]
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]
PACKAGED = Path(merge_module.__file__).parents[1] / "gramlite" / "data" / "reference"
TOKENS = numpy.random.default_rng(1).integers(0, 600, 100).tolist()
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.down_proj": 3.0}},
}


def adapted_logits(checkpoint: Path, adapter: Path, scale: Callable[[str, int], float]) -> Any:
    """transformers' logits with W + scale * B @ A, computed here."""
    import torch
    import transformers
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    factors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in factors:
                a, b = factors[f"{prefix}.lora_A.weight"].float(), factors[f"{prefix}.lora_B.weight"].float()
                parameter += scale(name, len(a)) * b @ a
        return model(torch.tensor([TOKENS])).logits[0, -1].numpy()


def scale_in(settings: str) -> Callable[[str, int], float]:
    def scale(name: str, rank: int) -> float:
        if settings == "rslora":
            return float(8 / rank**0.5)
        return (3.0 if settings == "patterns" and "down_proj" in name else 8.0) / rank

    return scale


def relative(found: Any, wanted: Any) -> float:
    return float(numpy.abs(found - wanted).max() / numpy.abs(wanted).max())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["llama-untied", "qwen3"])
def test_adapter_and_merge_give_the_logits_of_the_sum(
    family: str,
    settings: str,
    checkpoint_of: MakeAdapter,
    make_adapter: MakeAdapter,
    last_logits: Callable[..., Any],
    tmp_path: Path,
) -> None:
    checkpoint = checkpoint_of(family)
    folder = make_adapter(tmp_path / "peft", checkpoint, MODULES, **SETTINGS[settings])
    wanted = adapted_logits(checkpoint, folder, scale_in(settings))
    base, lora, merged = tmp_path / "base.gguf", tmp_path / "lora.gguf", tmp_path / "merged"
    export_gguf(checkpoint, base, dtype="f32")
    assert relative(last_logits(base, TOKENS), wanted) > 0.1
    for dtype, tolerance in (("f32", 1e-2), ("f16", 2e-2)):
        export_adapter(folder, checkpoint, lora, dtype=dtype, force=True)
        check_adapter_fits(read_header(lora, expect="adapter"), read_header(base))
        assert relative(last_logits(base, TOKENS, lora), wanted) < tolerance, dtype
    merge_adapter(checkpoint, folder, merged)
    export_gguf(merged, tmp_path / "merged.gguf", dtype="f32")
    assert relative(last_logits(tmp_path / "merged.gguf", TOKENS), wanted) < 1e-2


def test_q8_0_rounds_the_factors_whose_rows_fill_blocks(
    checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import gguf

    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), MODULES)
    values, types = {}, {}
    for dtype in ("f32", "q8_0"):
        export_adapter(folder, checkpoint_of("qwen2"), tmp_path / f"{dtype}.gguf", dtype=dtype)
        for tensor in gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors:
            values[dtype, tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
            types[dtype, tensor.name] = tensor.tensor_type.name
    for name in {name for _, name in values}:
        exact, rounded = values["f32", name], values["q8_0", name]
        assert types["q8_0", name] == ("Q8_0" if name.endswith("lora_a") else "F16")  # B has rows of 4
        assert 0 < numpy.abs(exact).max() and numpy.abs(exact - rounded).max() < 0.005 * numpy.abs(exact).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merging_rounds_once(dtype: str, checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = checkpoint_of("qwen2", dtype=dtype)
    folder = make_adapter(tmp_path / "peft", checkpoint, MODULES, lora_alpha=2)
    merge_adapter(checkpoint, folder, tmp_path / "merged")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(folder / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            change = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
            weight = (weight.float() + 0.5 * change).to(getattr(torch, dtype))
            assert not torch.equal(weight, before[name])
        assert torch.equal(after[name], weight), name


def test_a_merged_checkpoint_is_whole(checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(checkpoint_of("qwen2", shards=2), tmp_path / "checkpoint"))
    (checkpoint / "NOTICE").write_text("note")
    (checkpoint / "training_state.bin").write_bytes(b"pickle")
    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), MODULES)
    result = CliRunner().invoke(
        merge_module.command, [str(checkpoint), str(folder), "-o", str(tmp_path / "merged"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == "hf"
    merged = tmp_path / "merged"
    manifest = read_manifest(merged)
    assert manifest is not None and set(manifest.files) == {path.name for path in merged.iterdir()} - {"gramlite.json"}
    verify_files(merged, manifest)
    assert {path.name for path in checkpoint.iterdir()} - set(manifest.files) == {"training_state.bin"}
    assert open_checkpoint(merged).tensors.keys() == open_checkpoint(checkpoint).tensors.keys()
    again = CliRunner().invoke(merge_module.command, [str(checkpoint), str(folder), "-o", str(merged)])
    assert isinstance(again.exception, InputError)
    for destination in (checkpoint, checkpoint / "inside", tmp_path):
        with pytest.raises(InputError, match="lie in one another"):
            merge_adapter(checkpoint, folder, destination, force=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"the only one")
    with pytest.raises(InputError, match="is no checkpoint"):
        merge_adapter(checkpoint, folder, tmp_path / "photos", force=True)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "other method": ({"peft_type": "IA3"}, "'IA3'"),
    "dora": ({"use_dora": True}, "use_dora = True"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha = 0"),
    "rank": ({"r": 8}, "rank 8 .* its factors have 4"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_adapters_that_are_not_plain_lora_are_refused(
    name: str, checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    settings, message = REFUSALS[name]
    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), MODULES, **settings)
    with pytest.raises(ModelError, match=message):
        export_adapter(folder, checkpoint_of("qwen2"), tmp_path / "out")
    with pytest.raises(ModelError, match=message):
        merge_adapter(checkpoint_of("qwen2"), folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_factors_that_do_not_fit_are_refused(
    checkpoint_of: MakeAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    qwen, llama = checkpoint_of("qwen2"), checkpoint_of("qwen3")
    folder = make_adapter(tmp_path / "peft", qwen, MODULES)
    with pytest.raises(ModelError, match=r"adapts model\.layers\.0\.\S+ as \[32, 64\] and the base has \[64, 64\]"):
        export_adapter(folder, llama, tmp_path / "out.gguf")
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    first = next(name for name in good if "q_proj.lora_B" in name)
    faults: list[tuple[dict[str, Any], str]] = [
        ({name: tensor for name, tensor in good.items() if name != first}, r"lacks the factor B of model\.layers"),
        ({**good, first: torch.zeros(64, 3)}, "do not belong together"),
        ({**good, "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 8)}, "no LoRA factor"),
        ({**good, first: torch.full((64, 4), float("nan"))}, "no number"),
        ({name.replace("layers.1", "layers.7"): tensor for name, tensor in good.items()}, r"adapts model\.layers\.7"),
        ({}, "holds no LoRA factors"),
    ]
    for tensors, message in faults:
        save_file(tensors, file)
        with pytest.raises(ModelError, match=message):
            export_adapter(folder, qwen, tmp_path / "out.gguf")
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, a pickle"):
        export_adapter(folder, qwen, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_the_packaged_adapter_becomes_a_small_file(tmp_path: Path) -> None:
    output = tmp_path / "judge.lora.gguf"
    words = [
        str(PACKAGED),
        "--base",
        str(PACKAGED / "hf"),
        "-o",
        str(output),
        "--dtype",
        "q8_0",
        "--template",
        "gramlite",
        "--json",
    ]
    result = CliRunner().invoke(adapter_module.command, words)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["bytes"] < 11_000_000 and row["command"] == f"gramlite judge PAIRS.jsonl -m BASE.gguf --adapter {output}"
    header = read_header(output, expect="adapter")
    assert len(header.tensors) == 420 and {tensor.type for tensor in header.tensors} == {"Q8_0"}
    assert (header.metadata["adapter.type"], header.metadata["adapter.lora.alpha"]) == ("lora", 32.0)
    assert header.metadata["gramlite.template.name"] == "gramlite"


@pytest.mark.slow
def test_merging_reproduces_the_reference_checkpoint_bit_for_bit(
    reference_base: Path, reference_checkpoint: Path, tmp_path: Path
) -> None:
    merge_adapter(reference_base, PACKAGED, tmp_path / "merged")
    found, wanted = open_checkpoint(tmp_path / "merged"), open_checkpoint(reference_checkpoint)
    assert found.tensors.keys() == wanted.tensors.keys() and len(found.tensors) == 272
    bytes_of = {folder: (folder / "model.safetensors").read_bytes() for folder in (found.folder, wanted.folder)}
    for name, tensor in wanted.tensors.items():
        other = found.tensors[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        one, two = (bytes_of[t.file.parent][t.start : t.start + t.bytes] for t in (tensor, other))
        assert one == two, name
