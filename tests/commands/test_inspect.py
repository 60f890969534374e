"""`gramlite inspect`: folders tell what a GGUF file tells, from their headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramlite.commands.inspect import inspect_model
from gramlite.errors import ModelError
from gramlite.formats.artifact import Manifest, write_manifest

from ..export.conftest import checkpoint_of, write_tokenizer  # noqa: F401

SAME = (
    "path",
    "format",
    "name",
    "architecture",
    "quantization",
    "bits_per_weight",
    "bytes",
    "layers",
    "embedding",
    "heads",
    "key_value_heads",
    "vocabulary",
    "context",
    "template",
    "chat_template",
    "memory",
    "manifest",
)


def check_sums(found: dict[str, Any]) -> None:
    assert set(SAME) <= found.keys() and list(found["memory"])[-1] <= found["context"]
    for needed in found["memory"].values():
        assert needed["total"] == needed["weights"] + needed["kv_cache"] + needed["compute"]
    per_token = {needed["kv_cache"] // context for context, needed in found["memory"].items()}
    assert len(per_token) == 1 and per_token.pop() > 0


def test_a_checkpoint(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    folder = Path(shutil.copytree(checkpoint_of("llama-tied"), tmp_path / "judge"))
    config = json.loads((folder / "config.json").read_text())
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found = inspect_model(folder)
    check_sums(found)
    assert (found["format"], found["architecture"], found["layers"]) == (
        "hf",
        "LlamaForCausalLM",
        config["num_hidden_layers"],
    )
    bits = {"F32": 32, "BF16": 16, "F16": 16}[found["quantization"]]
    assert found["bits_per_weight"] == bits and found["memory_on"] == "the CPU, float32"
    weights = next(iter(found["memory"].values()))["weights"]
    assert 0.9 * stored < weights * bits / 32 <= stored, "the headers are small"
    assert found["template"] is None and found["manifest"] is None
    manifest = Manifest(
        format="hf", name="named", quantization="BF16", source={"name": "there"}, template={"name": "gramlite"}
    )
    write_manifest(folder, manifest)
    again = inspect_model(folder)
    assert (again["name"], again["quantization"], again["source"], again["template"]) == (
        "named",
        "BF16",
        "there",
        "gramlite",
    )


def test_quantized_folders_say_how(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    folder = Path(shutil.copytree(checkpoint_of("llama-tied"), tmp_path / "judge"))
    config = json.loads((folder / "config.json").read_text())
    for settings, format, name in (
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq", "GPTQ 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "hf", "NF4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "hf", "INT8"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        found = inspect_model(folder)
        assert (found["format"], found["quantization"]) == (format, name)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="awq"):
        inspect_model(folder)


def test_an_onnx_folder(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="an ONNX graph is read with onnx")
    pytest.importorskip("tokenizers", reason="the tokenizer is made with tokenizers")
    from onnx_decoder import random_weights, write_decoder

    folder = tmp_path / "judge"
    weights = random_weights(write_tokenizer(folder, "smollm"))
    write_decoder(folder, weights)
    found = inspect_model(folder)
    check_sums(found)
    assert found["format"] == "onnx" and found["memory_on"] == "onnxruntime"
    assert next(iter(found["memory"].values()))["weights"] >= 2 * sum(array.nbytes for array in weights.values())


def test_it_loads_no_runtime(checkpoint_of: Callable[..., Path]) -> None:  # noqa: F811
    code = (
        "import sys; from pathlib import Path; from gramlite.commands.inspect import inspect_model; "
        "inspect_model(Path(sys.argv[1])); "
        "print([name for name in ('torch', 'transformers', 'llama_cpp', 'onnxruntime') if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint_of("llama-tied"))], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"
