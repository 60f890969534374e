"""Mistral, the architecture of Prometheus, through every command; a model that is not known is refused alike by all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from gramlite.cli import run
from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import Artifact
from gramlite.formats.gguf_header import read_header
from gramlite.runtime.options import RuntimeOptions

from ..backends.conftest import logits_of

MakeCheckpoint = Callable[..., Path]
CPU = RuntimeOptions(device="cpu", threads=1)  # tiny models gain nothing from more
WINDOW = 48
pytestmark = pytest.mark.fault("mistral")


def tokens(count: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 600, count)]


def expected(folder: Path, ids: list[int]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("family", "count"), [("mistral", 300), ("mistral-window", WINDOW)])
def test_gguf_logits_are_those_of_transformers(
    family: str, count: int, checkpoint_of: MakeCheckpoint, last_logits: Callable[..., Any], tmp_path: Path
) -> None:
    source, output = checkpoint_of(family), tmp_path / "model.gguf"
    assert run(["export", "gguf", str(source), "-o", str(output), "--dtype", "f32", "--no-smoke", "--json"]) == 0
    assert error(last_logits(output, tokens(count)), expected(source, tokens(count))[-1]) < 1e-2
    context = read_header(output).metadata["llama.context_length"]
    assert context == (WINDOW if family == "mistral-window" else 512), "beyond the window llama.cpp attends to all"
    assert run(["quantize", "gguf", str(source), "-o", str(tmp_path / "q8.gguf"), "--type", "Q8_0", "--no-smoke"]) == 0
    assert error(last_logits(tmp_path / "q8.gguf", tokens(count)), expected(source, tokens(count))[-1]) < 0.1


def test_adapters_and_merges_of_a_mistral(
    checkpoint_of: MakeCheckpoint, make_adapter: MakeCheckpoint, last_logits: Callable[..., Any], tmp_path: Path
) -> None:
    source = checkpoint_of("mistral")
    adapter = make_adapter(tmp_path / "peft", source, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    merged, lora, base = tmp_path / "merged", tmp_path / "lora.gguf", tmp_path / "base.gguf"
    assert run(["export", "merge", str(source), str(adapter), "-o", str(merged), "--no-smoke"]) == 0
    words = ["export", "adapter", str(adapter), "--base", str(source), "-o", str(lora), "--dtype", "f32", "--no-smoke"]
    assert run(words) == 0
    assert run(["export", "gguf", str(source), "-o", str(base), "--dtype", "f32", "--no-smoke"]) == 0
    wanted = expected(merged, tokens(100))[-1]
    assert error(last_logits(base, tokens(100)), wanted) > 0.05
    assert error(last_logits(base, tokens(100), lora), wanted) < 1e-2


@pytest.mark.parametrize(
    ("family", "count"), [pytest.param("mistral", 200, marks=pytest.mark.slow), ("mistral-window", WINDOW)]
)
def test_onnx_logits_are_those_of_transformers(
    family: str, count: int, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    from gramlite.backends.onnx import open_artifact

    source = checkpoint_of(family)
    assert run(["export", "onnx", str(source), "-o", str(tmp_path / "judge"), "--no-smoke", "--json"]) == 0
    backend = open_artifact(Artifact(tmp_path / "judge", "onnx", None), CPU)
    found, _ = logits_of(backend, tokens(count)[:-9], (20,), [tokens(count)[-9:-8], tokens(count)[-8:]])
    wanted = expected(source, tokens(count))
    for logits, position in zip(found, (count - 10, count - 9, count - 1), strict=True):
        assert error(logits, wanted[position]) < 1e-4
    assert backend.context == (WINDOW if family == "mistral-window" else 512)
    backend.close()


def test_the_hf_backend_keeps_to_the_window(checkpoint_of: MakeCheckpoint) -> None:
    """A full window is no end: what follows takes back some of it and is computed as from the beginning."""
    from gramlite.backends.hf import open_artifact

    source = checkpoint_of("mistral-window")
    backend = open_artifact(Artifact(source, "hf", None), CPU)
    assert backend.context == WINDOW
    for seed in (1, 2):
        ids = tokens(20) + tokens(WINDOW - 20, seed)
        found, _ = logits_of(backend, ids[:-1], (20,), [ids[-1:]])
        wanted = expected(source, ids)
        assert error(found[0], wanted[-2]) < 1e-4 and error(found[1], wanted[-1]) < 1e-4
    backend.close()


@pytest.mark.slow
def test_gptq_and_bitsandbytes_of_a_mistral(
    checkpoint_of: MakeCheckpoint, last_logits: Callable[..., Any], tmp_path: Path
) -> None:
    from gramlite.quant.calibration import Transcript, describe
    from gramlite.quant.gptq import quantize_gptq
    from gramlite.quant.solve import GptqSettings

    from gramlite.formats.gptq_folder import open_gptq

    def quantize(family: str, length: int) -> Path:
        transcripts = [Transcript(tuple(tokens(length - 1, seed)), (seed,), str(seed)) for seed in (3, 4)]
        calibration = describe(transcripts, tokens=1000, seed=0, source="made up")
        output, settings = tmp_path / f"{family}-{length}", GptqSettings(bits=8, group_size=32)
        quantize_gptq(checkpoint_of(family), output, transcripts, settings, calibration=calibration)
        return output

    folder = quantize("mistral", 120)
    quantize("mistral-window", WINDOW)
    with pytest.raises(InputError, match=f"has {WINDOW + 1} tokens; the model's attention spans {WINDOW}"):
        quantize("mistral-window", WINDOW + 1)
    assert len(open_gptq(folder).linears) == 14
    assert run(["pack", str(folder), "-o", str(tmp_path / "packed.gguf"), "--no-smoke"]) == 0
    wanted = expected(checkpoint_of("mistral"), tokens(100))[-1]
    assert error(last_logits(tmp_path / "packed.gguf", tokens(100)), wanted) < 0.1
    pytest.importorskip("bitsandbytes")
    words = [
        "quantize",
        "bnb",
        str(checkpoint_of("mistral")),
        "-o",
        str(tmp_path / "bnb"),
        "--type",
        "int8",
        "--no-smoke",
    ]
    assert run(words) == 0


COMMANDS = {
    "export gguf": ["export", "gguf", "{model}", "-o", "{out}"],
    "export onnx": ["export", "onnx", "{model}", "-o", "{out}"],
    "export adapter": ["export", "adapter", "{adapter}", "--base", "{model}", "-o", "{out}"],
    "export merge": ["export", "merge", "{model}", "{adapter}", "-o", "{out}"],
    "quantize gguf": ["quantize", "gguf", "{model}", "-o", "{out}"],
    "quantize gptq": ["quantize", "gptq", "{model}", "-o", "{out}", "--calibration", "{pairs}"],
    "quantize onnx": ["quantize", "onnx", "{model}", "-o", "{out}"],
    "quantize bnb": ["quantize", "bnb", "{model}", "-o", "{out}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_family_is_refused_in_the_same_words_before_any_work(
    name: str,
    checkpoint_of: MakeCheckpoint,
    make_adapter: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(checkpoint_of("mistral"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    changed = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (model / "config.json").write_text(json.dumps(config | changed))
    adapter = make_adapter(tmp_path / "peft", model, ["model.layers.0.mlp.up_proj"])
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "response_a": "a", "response_b": "b"}\n')
    places = {"model": model, "adapter": adapter, "out": tmp_path / "out", "pairs": tmp_path / "pairs.jsonl"}
    assert run([word.format(**places) for word in COMMANDS[name]]) == ModelError.exit_code
    told = capsys.readouterr().err
    assert (
        "The architecture 'MixtralForCausalLM' is unknown here. Known are LlamaForCausalLM, MistralForCausalLM" in told
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pairs.jsonl", "peft"]


@pytest.mark.parametrize("value", [0, -1, "4096", True, 1.5])
def test_an_unusable_window_is_refused(value: Any, checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    from gramlite.export.gguf import export_gguf

    model = Path(shutil.copytree(checkpoint_of("mistral"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sliding_window": value}))
    with pytest.raises(ModelError, match="sliding_window is"):
        export_gguf(model, tmp_path / "model.gguf")


def test_a_mistral_that_says_nothing_of_its_window_has_that_of_transformers(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    from gramlite.formats.architecture import read_architecture

    config = json.loads((checkpoint_of("mistral") / "config.json").read_text()) | {"max_position_embeddings": 32768}
    del config["sliding_window"]
    assert read_architecture(config).context == transformers.MistralConfig().sliding_window == 4096
