"""Fixtures: tiny checkpoints with random weights, of each family that layer by layer quantization knows."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="quantization is done in torch: pip install 'gramlite[hf]'")
pytest.importorskip("transformers", reason="quantization needs the models of transformers: pip install 'gramlite[hf]'")

from gramlite.quant.calibration import Transcript

FAMILIES = ("llama", "qwen2", "qwen3")
VOCABULARY = 96


def small_config(family: str, **changes: Any) -> Any:
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family == "llama",
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return kind(**(sizes | changes))


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Build and save a checkpoint; keyword arguments change its configuration."""

    def make(family: str = "llama", dtype: str = "bfloat16", **changes: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(small_config(family, **changes))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as ones and biases as zeros; make them say something
                parameter.data += torch.randn_like(parameter) * 0.1
        folder = tmp_path / f"{family}-checkpoint"
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def transcripts() -> list[Transcript]:
    """Twelve transcripts of random tokens, of different lengths, that end in the verdict 7 or 9."""
    draw = random.Random(11)
    return [
        Transcript(
            tuple(draw.randrange(VOCABULARY) for _ in range(40 + 3 * number)),
            (*(draw.randrange(VOCABULARY) for _ in range(5)), 7 if number % 3 else 9),
            str(number),
        )
        for number in range(12)
    ]
