"""The layer by layer pass against transformers' own forward, watched through hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gramlite.quant import batches
from gramlite.quant.batches import lay_out
from gramlite.quant.calibration import Transcript
from gramlite.quant.memory import PeakMemory
from gramlite.quant.stream import Stage, stream_decoder
from transformers import AutoModelForCausalLM

from gramlite.errors import InputError, ModelError
from gramlite.formats.checkpoint import open_checkpoint

from .conftest import FAMILIES

Make = Callable[..., Path]


def collect(
    folder: Path, transcripts: list[Transcript], **options: Any
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    moments = {}

    def visit(stage: Stage) -> None:
        moments.update(dict.fromkeys(stage.linears, stage.moment))

    hidden = stream_decoder(open_checkpoint(folder), transcripts, visit, **options)
    return moments, hidden


def watch(
    folder: Path, transcripts: list[Transcript], weigh: Any = None
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The same figures from hooks on the whole model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    moments: dict[str, torch.Tensor] = {}
    last: list[torch.Tensor] = []
    number = 0

    def hook(name: str) -> Any:
        def add(module: Any, inputs: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            weights = weigh(name, number) if weigh else torch.ones(len(x))
            moments[name] = moments.get(name, 0) + (x * weights.double().unsqueeze(-1)).T @ x

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0][0]))
    with torch.inference_mode():
        for number, transcript in enumerate(transcripts):  # noqa: B007
            model(torch.tensor([transcript.ids]))
    return moments, last


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_and_states_are_those_of_transformers(
    family: str, make_checkpoint: Make, transcripts: list[Transcript]
) -> None:
    folder = make_checkpoint(family)
    moments, hidden = collect(folder, transcripts)
    expected, states = watch(folder, transcripts)
    assert set(moments) == set(expected)
    for name, moment in moments.items():
        assert torch.allclose(moment.double(), expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))
    for ours, theirs in zip(hidden, states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_is_computed_once_and_counts_as_often_as_it_stands(
    family: str, make_checkpoint: Make, transcripts: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    def weigh(name: str, number: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(len(name) + number)
        return torch.rand(len(shared[number].ids), generator=drawn) ** 4

    monkeypatch.setattr(batches, "BATCH_TOKENS", 150)
    shared = [Transcript(tuple(range(40)) + one.prompt_ids, one.generated_ids, one.id) for one in transcripts]
    laid = lay_out(shared)
    assert [batch.start for batch in laid] == [0] + [40] * (len(laid) - 1)
    assert laid[0].sequences == (tuple(range(40)),)
    assert sum(sum(batch.lengths) for batch in laid) == sum(len(one.ids) - 40 for one in shared) + 40
    folder = make_checkpoint(family)
    for weights in (None, weigh):
        moments, hidden = collect(folder, shared, weigh=weights)
        expected, states = watch(folder, shared, weights)
        for name, moment in moments.items():
            close = {"rtol": 1e-4, "atol": 1e-4 * float(expected[name].abs().max())}
            assert torch.allclose(moment.double(), expected[name], **close)
        for ours, theirs in zip(hidden, states, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_short_or_missing_prefixes_are_not_shared(transcripts: list[Transcript]) -> None:
    assert lay_out(transcripts)[0].start == 0
    assert not lay_out(transcripts[:1])[0].is_prefix
    same = [Transcript(tuple(range(30)), (7,), str(number)) for number in range(3)]
    assert [(batch.start, batch.lengths) for batch in lay_out(same)] == [(0, (30,)), (30, (1, 1, 1))]
    assert [batch.lengths for batch in lay_out(same, verdicts=False)] == [(29,), (1, 1, 1)]
    assert [batch.start for batch in lay_out(same, share=False)] == [0]


def test_positions_count_by_their_weight(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    def weigh(name: str, number: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(len(name) + number)
        return torch.rand(len(transcripts[number].ids), generator=drawn) ** 4

    folder = make_checkpoint()
    moments, _ = collect(folder, transcripts, weigh=weigh)
    expected, _ = watch(folder, transcripts, weigh)
    plain, _ = collect(folder, transcripts)
    for name, moment in moments.items():
        assert torch.allclose(moment.double(), expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))
        assert not torch.allclose(moment, plain[name], rtol=0.1)


def test_wide_inputs_are_summed_in_panels(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint(intermediate_size=640, num_hidden_layers=1)
    moments, _ = collect(folder, transcripts)
    expected, _ = watch(folder, transcripts)
    name = "model.layers.0.mlp.down_proj"
    assert moments[name].shape == (640, 640)
    assert torch.allclose(moments[name].double(), expected[name], rtol=1e-4, atol=1e-6)


def test_later_layers_see_replaced_weights(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint()
    plain, _ = collect(folder, transcripts)
    seen: dict[str, torch.Tensor] = {}

    def visit(stage: Stage) -> None:
        for name, module in stage.linears.items():
            seen[name] = stage.moment
            if name == "model.layers.0.self_attn.v_proj":
                module.weight.zero_()

    stream_decoder(open_checkpoint(folder), transcripts, visit)
    assert torch.equal(seen["model.layers.0.self_attn.q_proj"], plain["model.layers.0.self_attn.q_proj"])
    assert not seen["model.layers.0.self_attn.o_proj"].any()
    assert not torch.allclose(seen["model.layers.1.mlp.up_proj"], plain["model.layers.1.mlp.up_proj"], rtol=1e-3)


def test_one_layer_is_in_memory_at_a_time(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint(hidden_size=512, intermediate_size=1024, num_hidden_layers=24, head_dim=128)
    layer = (4 * 512 * 512 - 2 * 256 * 512 + 3 * 512 * 1024) * 4
    collect(folder, transcripts[:1])  # what torch allocates once
    with PeakMemory() as warm:
        pass
    with PeakMemory() as running:
        stream_decoder(open_checkpoint(folder), transcripts, lambda stage: None)
    assert running.peak - warm.peak < 8 * layer  # of 24; the allocator keeps a few that were freed


def test_refusals(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint()
    with pytest.raises(InputError, match="no calibration transcript"):
        collect(folder, [])
    with pytest.raises(InputError, match="holds token 96"):
        collect(folder, [Transcript((1, 96), (), "far")])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(ModelError, match=r"gate_proj.weight is \(128, 64\)"):
        collect(folder, transcripts)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(ModelError, match="'gemma2'"):
        collect(folder, transcripts)
