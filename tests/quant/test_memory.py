"""The arithmetic of what GPTQ needs, against what is known of two models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gramlite.quant.memory import HELD_BYTES, PROCESS_BYTES, pick_device, predict_bytes

from gramlite.errors import InputError, ResourceError

REFERENCE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
GIBIBYTE = 1 << 30


def test_an_8b_llama_fits_into_24_gibibytes() -> None:
    """64 transcripts of 1,024 tokens, of which nothing is shared."""
    predicted = predict_bytes(LLAMA_8B, 64 * 1024)
    assert 4 * GIBIBYTE < predicted.total < 24 * GIBIBYTE
    layer = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    moments = 4 * 4 * 14336**2
    assert predicted.quantizing > layer + moments + 65_536 * (4096 + 14336) * 4
    assert predicted.gradients > layer + 33 * 1024 * 4096 * 4
    assert predicted.writing > 2 * GIBIBYTE
    cuda = predict_bytes(LLAMA_8B, 64 * 1024, device="cuda")
    assert cuda.process == cuda.writing == 0
    assert cuda.total < predicted.total / 1.5


def test_the_reference_judge_takes_little_more_than_its_libraries() -> None:
    predicted = predict_bytes(REFERENCE, 12_000, batch=1300)
    assert PROCESS_BYTES < predicted.total < 1.3e9
    assert predict_bytes(REFERENCE, 12_000, focus=False).gradients == 0
    assert predict_bytes(REFERENCE, 48_000).quantizing > 2 * predicted.quantizing
    assert predict_bytes(REFERENCE, 12_000, batch=5000).gradients > 3 * predicted.gradients
    assert (
        replace(predicted, writing=10 * predicted.writing).total == PROCESS_BYTES + HELD_BYTES + 10 * predicted.writing
    )


def test_cuda_is_refused_with_its_reason_where_there_is_none() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises(ResourceError, match="--device cuda was asked for, but .*CUDA.* Type --device cpu"):
        pick_device("cuda")
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        pick_device("gpu")
