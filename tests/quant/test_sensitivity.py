"""Gradients of the margin against plain autograd on the whole model, and what they promise against what happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gramlite.quant import batches, sensitivity
from gramlite.quant.calibration import Transcript
from gramlite.quant.decoder import CheckpointDecoder
from gramlite.quant.memory import HELD_BYTES, PeakMemory
from gramlite.quant.sensitivity import Reading, read_gradients, verdict_tokens, verdict_weights, weighing_room
from transformers import AutoModelForCausalLM

from gramlite.errors import InputError
from gramlite.formats.checkpoint import open_checkpoint

from .conftest import FAMILIES

Make = Callable[..., Path]


def margin(model: Any, transcript: Transcript) -> torch.Tensor:
    logits = model(torch.tensor([transcript.ids[:-1]])).logits[0, -1]
    difference: torch.Tensor = logits[7] - logits[9]
    return difference


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_readings_are_the_weights_gradients(
    family: str, make_checkpoint: Make, transcripts: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "STATE_BYTES", 200_000)
    monkeypatch.setattr(sensitivity, "free_bytes", lambda device: 0)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 150)  # several batches a group, several groups
    folder = make_checkpoint(family)
    found: dict[tuple[str, int], torch.Tensor] = {}

    def visit(reading: Reading) -> None:
        found[reading.name, reading.number] = reading.gradients.T @ reading.inputs

    heard: list[tuple[int, int]] = []
    margins = read_gradients(
        open_checkpoint(folder), transcripts, visit, after_layer=lambda done, total: heard.append((done, total))
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, transcript in enumerate(transcripts):
        model.zero_grad()
        expected = margin(model, transcript)
        expected.backward()
        assert margins[number] == pytest.approx(float(expected.detach()), abs=1e-4)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                gradient = module.weight.grad
                assert torch.allclose(found[name, number], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    assert len(found) == 14 * 12
    assert heard[-1][0] == heard[-1][1] == len(heard)
    assert len(heard) > 2 * 2 * 2


def test_weights_are_mean_one_over_the_floor(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    weigh = verdict_weights(open_checkpoint(make_checkpoint()), transcripts, floor=0.25)
    name = "model.layers.1.mlp.up_proj"
    rows = [weigh(name, number) for number in range(len(transcripts))]
    assert [len(row) for row in rows] == [len(transcript.ids) for transcript in transcripts]
    assert all(float(row[-1]) == 0.25 for row in rows)
    assert torch.cat([row[:-1] for row in rows]).mean() == pytest.approx(1.25, rel=1e-3)
    # behind the last attention only the position that is read counts
    assert all(float(row[:-2].max()) == 0.25 for row in rows)
    early = weigh("model.layers.0.mlp.up_proj", 0)
    assert float(early[:-2].max()) > 0.26


def test_a_checkpoint_is_read_as_often_as_the_room_asks_for(
    make_checkpoint: Make, transcripts: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the same, bit for bit, however many batches go through a layer while it is in memory."""
    checkpoint = open_checkpoint(make_checkpoint())
    shared = [Transcript(tuple(range(40)) + one.prompt_ids, one.generated_ids, one.id) for one in transcripts]
    monkeypatch.setattr(batches, "BATCH_TOKENS", 150)
    read: list[int] = []
    layer_of = CheckpointDecoder.layer

    def counted(self: CheckpointDecoder, index: int) -> Any:
        read.append(index)
        return layer_of(self, index)

    monkeypatch.setattr(CheckpointDecoder, "layer", counted)
    found = []
    for room in (0, 3 * 64 * 4 * 600, 1 << 30):
        monkeypatch.setattr(sensitivity, "weighing_room", lambda checkpoint, device, room=room: room)
        before = len(read)
        weigh = verdict_weights(checkpoint, shared)
        found.append((len(read) - before, [weigh("model.layers.0.mlp.up_proj", number) for number in range(12)]))
    (often, first), (less, second), (once, third) = found
    assert often > less > once == 2 * 2
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_the_room_grows_with_the_checkpoint(make_checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    stored = sum(tensor.bytes for tensor in checkpoint.tensors.values())
    monkeypatch.setattr(sensitivity, "free_bytes", lambda device: 1 << 40)
    assert weighing_room(checkpoint, "cpu") == stored // 4
    monkeypatch.setattr(sensitivity, "free_bytes", lambda device: 4000)
    assert weighing_room(checkpoint, "cpu") == 1000


@pytest.mark.parametrize(("tokens", "tolerance"), [(1, 1e-3), (150, 0.6)])
def test_of_a_shared_prefix_the_mean_is_estimated(
    tokens: int, tolerance: float, make_checkpoint: Make, transcripts: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only one transcript holds is exact, and so is the prefix's mean where batches are of one transcript."""
    shared = [Transcript(tuple(range(40)) + one.prompt_ids, one.generated_ids, one.id) for one in transcripts]
    checkpoint = open_checkpoint(make_checkpoint())
    exact: dict[tuple[str, int], torch.Tensor] = {}

    def visit(reading: Reading) -> None:
        exact[reading.name, reading.number] = reading.gradients.square().sum(-1)

    read_gradients(checkpoint, shared, visit)
    monkeypatch.setattr(batches, "BATCH_TOKENS", tokens)
    weigh = verdict_weights(checkpoint, shared, floor=0.0)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"):
        rows = [weigh(name, number)[:-1] for number in range(12)]
        expected = [exact[name, number] for number in range(12)]
        scale = float((rows[5][40:] * expected[5][40:]).sum() / expected[5][40:].square().sum())
        for row, wanted in zip(rows, expected, strict=True):
            assert torch.allclose(row[40:], scale * wanted[40:], rtol=1e-3, atol=1e-5 * float(row.max()))
        before = torch.stack([row[:40] for row in rows]).sum(0)
        wanted = scale * torch.stack([row[:40] for row in expected]).sum(0)
        assert float(before.sum()) == pytest.approx(float(wanted.sum()), rel=tolerance)
        assert torch.corrcoef(torch.stack([before, wanted]))[0, 1] > 0.8


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    checkpoint = open_checkpoint(
        make_checkpoint(hidden_size=512, intermediate_size=1024, num_hidden_layers=24, head_dim=128)
    )
    layer = (4 * 512 * 512 - 2 * 256 * 512 + 3 * 512 * 1024) * 4
    states = 25 * sum(len(transcript.ids) for transcript in transcripts) * 512 * 4
    verdict_weights(checkpoint, [transcripts[0], transcripts[2]])  # what torch allocates once
    with PeakMemory() as warm:
        pass
    with PeakMemory() as running:
        verdict_weights(checkpoint, transcripts)
    assert running.peak - warm.peak < states + HELD_BYTES + 8 * layer  # of 24


def test_both_verdicts_are_needed(transcripts: list[Transcript]) -> None:
    assert verdict_tokens(transcripts) == (7, 9)
    with pytest.raises(InputError, match="end with 1 different tokens"):
        verdict_tokens([Transcript((1, 2), (7,), "x")])
    with pytest.raises(InputError, match="Give more pairs"):
        verdict_tokens([*transcripts, Transcript((1,), (3,), "x")])
