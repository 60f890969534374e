"""Exported GGUF files against transformers: logits, tokens, exact weights, metadata, and the judge's margins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from click.testing import CliRunner
from gramlite.export.gguf import command, export_gguf

from gramlite.errors import InputError
from gramlite.formats.artifact import read_manifest, verify_files
from gramlite.formats.gguf_header import read_header

FAMILIES = ("llama3.1", "llama-tied", "llama-untied", "llama-linear", "qwen2", "qwen2-yarn", "qwen3")


def transformers_logits(folder: Path, tokens: list[int]) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].numpy()


def some_tokens(count: int) -> list[int]:
    return numpy.random.default_rng(1).integers(0, 600, count).tolist()


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    header = read_header(path)
    data = path.read_bytes()[header.data_offset :]
    return {t.name: (t.type, t.shape, data[t.offset : t.offset + t.bytes]) for t in header.tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, checkpoint_of: Callable[..., Path], last_logits: Callable[..., Any], tmp_path: Path
) -> None:
    folder, tokens = checkpoint_of(family), some_tokens(300)
    export_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    wanted, found = transformers_logits(folder, tokens), last_logits(tmp_path / "model.gguf", tokens)
    assert numpy.abs(found - wanted).max() < 1e-2 * numpy.abs(wanted).max()


def test_the_logits_test_would_notice_missing_rope_factors(
    checkpoint_of: Callable[..., Path], last_logits: Callable[..., Any], tmp_path: Path
) -> None:
    folder, tokens = tmp_path / "unscaled", some_tokens(300)
    shutil.copytree(checkpoint_of("llama3.1"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    export_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    wanted, found = transformers_logits(checkpoint_of("llama3.1"), tokens), last_logits(tmp_path / "model.gguf", tokens)
    assert numpy.abs(found - wanted).max() > 0.1 * numpy.abs(wanted).max()


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_f32_is_exact_and_bf16_is_exact_for_a_bf16_checkpoint(
    family: str, source: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    folder = checkpoint_of(family, dtype=source)
    weights = load_file(folder / "model.safetensors")
    for dtype in ("f32", "bf16"):
        export_gguf(folder, tmp_path / f"{dtype}.gguf", dtype=dtype)
        written = tensor_bytes(tmp_path / f"{dtype}.gguf")
        for name, target, heads in (
            ("model.embed_tokens.weight", "token_embd.weight", 0),
            ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", 0),
            ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", 2),
            ("model.norm.weight", "output_norm.weight", 0),
        ):
            tensor = weights[name]
            if heads and family.startswith("llama"):  # rows of each head interleaved: 0, d/2, 1, d/2 + 1, ...
                size = tensor.shape[0] // heads
                order = [
                    head * size + half * size // 2 + row
                    for head in range(heads)
                    for row in range(size // 2)
                    for half in (0, 1)
                ]
                tensor = tensor[order]
            kept = torch.float32 if dtype == "f32" or tensor.ndim == 1 else torch.bfloat16
            wanted = tensor.to(kept).contiguous().view(torch.uint8).numpy().tobytes()
            assert written[target] == (
                str(kept).replace("torch.bfloat16", "BF16").replace("torch.float32", "F32"),
                tuple(tensor.shape[::-1]),
                wanted,
            )


def test_shards_give_the_same_file_as_one_file(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    sharded = checkpoint_of("qwen2", shards=2)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    export_gguf(sharded, tmp_path / "sharded.gguf", dtype="bf16")
    export_gguf(checkpoint_of("qwen2"), tmp_path / "whole.gguf", dtype="bf16")
    assert tensor_bytes(tmp_path / "sharded.gguf") == tensor_bytes(tmp_path / "whole.gguf")


def test_manifest_and_metadata(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    template = tmp_path / "prompt.txt"
    template.write_text("Compare.\n{question}\n---\n{response_a}\n---\n{response_b}\n")
    output = tmp_path / "judge.gguf"
    export_gguf(checkpoint_of("qwen2"), output, template=str(template))
    manifest = read_manifest(output)
    assert manifest is not None
    verify_files(output, manifest)
    assert (manifest.format, manifest.quantization, manifest.name) == ("gguf", "F16", "judge")
    assert set(manifest.source["files"]) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    metadata = read_header(output).metadata
    assert metadata["gramlite.template.text"] == "Compare.\n{question}\n---\n{response_a}\n---\n{response_b}"
    assert manifest.template == {"name": "custom", "sha256": metadata["gramlite.template.sha256"]}
    assert metadata["gramlite.tokenizer.normalizer"] == "NFC"
    assert metadata["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    types = metadata["tokenizer.ggml.token_type"]
    tokens = list(metadata["tokenizer.ggml.tokens"])
    assert [int(types[tokens.index(text)]) for text in ("<|im_end|>", "<think>", "a", f"[PAD{len(tokens) - 1}]")] == [
        3,
        4,
        1,
        5,
    ]
    assert metadata["tokenizer.ggml.eos_token_id"] == tokens.index("<|im_end|>")


def test_the_template_comes_from_the_model_card(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    card = Path(__file__).resolve().parents[2] / "../shared/gram_r2/model_card.md"
    if not card.is_file():
        pytest.skip("the stand-in model card is not here")
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("llama3.1"), folder)
    shutil.copyfile(card, folder / "README.md")
    manifest = export_gguf(folder, tmp_path / "judge.gguf")
    digest = "3bbed89b057f078e352e480b964a22bd19357bcadf294edbaaf9d9f6bf5c2820"
    assert manifest.template == {"name": "gram-r2", "sha256": digest}
    metadata = read_header(tmp_path / "judge.gguf").metadata
    assert (metadata["gramlite.template.name"], metadata["gramlite.template.sha256"]) == ("gram-r2", digest)
    assert len(str(metadata["gramlite.template.text"])) == 1925


def test_the_command_prints_the_artifact(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "judge.gguf"
    words = [str(checkpoint_of("qwen3")), "-o", str(output), "--dtype", "bf16", "--json"]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["bytes"] == output.stat().st_size
    assert row["sha256"] == read_manifest(output).files["judge.gguf"]  # type: ignore[union-attr]
    assert row["command"] == f"gramlite judge PAIRS.jsonl -m {output} --template FILE"
    assert 16 < row["bits_per_weight"] < 16.2
    assert "no judge template" in result.stderr
    again = CliRunner().invoke(command, words)
    assert isinstance(again.exception, InputError) and "--force" in str(again.exception)
    assert CliRunner().invoke(command, [*words, "--force"]).exit_code == 0


def test_peak_memory_is_far_below_the_tensors(tmp_path: Path) -> None:
    """One tensor of 400 MB: the pieces in flight, not the tensor, decide what is needed."""
    import subprocess
    import sys

    script = """
import hashlib, resource, sys
from pathlib import Path
from gramlite.formats.checkpoint import StoredTensor
from gramlite.formats.tensor_stream import convert, read_pieces
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensor = StoredTensor("w", "BF16", (50_000, 4_000), path, 0, 400_000_000)
with path.open("rb", buffering=0) as file:
    digest = hashlib.sha256()
    for piece in read_pieces(file, tensor):
        digest.update(convert(piece, "BF16", "F32"))
    digest.hexdigest()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(400_000_000)
    grown = int(
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True).stdout
    )
    assert grown < 120_000  # KiB
