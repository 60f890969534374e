"""Types by what they do to the margin: the changes against autograd, the choice against every choice there is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gramlite.quant import mixed
from gramlite.quant.allocate import ALONE, Option, allocate
from gramlite.quant.calibration import Transcript, choose_transcripts, write_transcripts
from gramlite.quant.ggml import rounded
from gramlite.quant.gguf import command
from gramlite.quant.imatrix import collect_importance
from gramlite.quant.mixed import choose_types, choose_weighed, kinds_for, measure, products, settle, target_bits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gramlite.errors import InputError, ModelError
from gramlite.formats.artifact import read_manifest
from gramlite.formats.checkpoint import open_checkpoint
from gramlite.formats.gguf_header import read_header
from gramlite.formats.quantization import bits_per_weight

from ..export.conftest import checkpoint_of  # noqa: F401

Make = Callable[..., Path]


def objective(options: Sequence[Option]) -> float:
    together = np.square(np.sum([option.changes for option in options], axis=0)).mean()
    return float(together + ALONE * sum(np.square(option.changes).mean() for option in options))


def drawn(seed: int, *, shared: float) -> dict[str, list[Option]]:
    """Five matrices of four sizes each whose errors fall with the size; `shared` is how much all of them have in common."""
    draw = np.random.default_rng(seed)
    common = draw.standard_normal(8)
    made = {}
    for number in range(5):
        scale = float(np.exp(draw.normal()))
        made[f"matrix {number}"] = [
            Option(kind, size * (number + 1) * 10, scale * (shared * common + draw.standard_normal(8)) / 2**place)
            for place, (kind, size) in enumerate((("Q4_0", 4), ("Q5_0", 5), ("Q6_K", 6), ("Q8_0", 8)))
        ]
    return made


def best(options: Mapping[str, Sequence[Option]], budget: int) -> float:
    fitting = (
        choice for choice in itertools.product(*options.values()) if sum(option.bytes for option in choice) <= budget
    )
    return min(objective(choice) for choice in fitting)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_choice_is_as_good_as_the_best_of_all(shared: float) -> None:
    exact = 0
    for seed in range(24):
        options = drawn(seed, shared=shared)
        budget = int(np.random.default_rng(seed).integers(620, 1150))
        chosen = allocate(options, budget)
        assert list(chosen) == list(options)
        assert sum(option.bytes for option in chosen.values()) <= budget
        found, wanted = objective(list(chosen.values())), best(options, budget)
        assert found < 1.2 * wanted
        exact += found < wanted * (1 + 1e-9)
    assert exact >= 18


def test_errors_that_cancel_are_left_alone() -> None:
    """Each matrix alone would take the larger type first where it errs most; together the two make up for each other."""
    up, down, small = np.full(4, 3.0), np.full(4, -3.0), np.array([2.9, -2.9, 2.9, -2.9])
    options = {
        name: [Option("Q4_0", 10, changes), Option("Q8_0", 20, changes * 0)]
        for name, changes in (("a", up), ("b", down), ("c", small))
    }
    assert [option.kind for option in allocate(options, 40).values()] == ["Q4_0", "Q4_0", "Q8_0"]
    assert [option.kind for option in allocate(options, 60).values()] == ["Q8_0"] * 3
    with pytest.raises(InputError, match="smallest types take 30 bytes and the target leaves 29"):
        allocate(options, 29)


def test_layers_that_no_verdict_hangs_on_are_not_forgotten() -> None:
    nothing = np.zeros(4)
    options = {
        "verdict": [Option("Q4_0", 10, nothing + 1, 0.01), Option("Q8_0", 20, nothing + 0.99, 0.0)],
        "rationale": [Option("Q4_0", 10, nothing, 0.5), Option("Q8_0", 20, nothing, 0.0)],
    }
    assert allocate(options, 30)["rationale"].kind == "Q8_0"


def test_changes_are_products_with_the_gradients(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint("qwen2")  # whose head is its own
    checkpoint = open_checkpoint(folder)
    found = measure(checkpoint, transcripts)
    assert len(found) == 14 + 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = {
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
        "token_embd.weight": "model.embed_tokens",
    }
    for number, transcript in enumerate(transcripts):
        model.zero_grad()
        logits = model(torch.tensor([transcript.ids[:-1]])).logits[0, -1]
        (logits[7] - logits[9]).backward()
        for name, part in parts.items():
            weight = model.get_submodule(part).weight
            for option in found[name]:
                error = rounded(weight.detach().numpy(), option.kind) - weight.detach().numpy()
                expected = float((weight.grad * torch.from_numpy(error)).sum())
                assert option.changes[number] == pytest.approx(expected, rel=0.02, abs=2e-5)
    sizes = {option.kind: option.bytes for option in found["blk.0.attn_q.weight"]}
    assert sizes == {"Q8_0": 4352, "Q5_1": 3072, "Q5_0": 2816, "Q4_1": 2560, "IQ4_NL": 2304, "Q4_0": 2304}
    local = {option.kind: option.local for option in found["blk.0.attn_q.weight"]}
    assert 0 < local["Q8_0"] < local["Q5_0"] < local["Q4_0"] < 0.02


def test_a_tied_embedding_is_weighed_as_the_head_too(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    found = measure(open_checkpoint(make_checkpoint("llama")), transcripts)
    assert "output.weight" not in found
    rms = {option.kind: float(np.sqrt(np.square(option.changes).mean())) for option in found["token_embd.weight"]}
    assert rms["Q8_0"] < rms["Q5_0"] < rms["Q4_0"]


def test_a_stored_copy_of_a_tied_head_counts_for_nothing(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint("llama")
    wanted = choose_types(folder, transcripts, bits=5.0)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    found = choose_types(folder, transcripts, bits=5.0)
    assert {name: each.kind for name, each in found.options.items()} == {
        name: each.kind for name, each in wanted.options.items()
    }


def test_a_head_that_is_missing_is_no_tied_one(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint("qwen2")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lacks the matrix 'lm_head.weight'"):
        choose_types(folder, transcripts, bits=5.0)


def test_where_memory_is_short_rounding_errors_are_kept_in_half_of_it(
    make_checkpoint: Make, transcripts: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    whole = measure(checkpoint, transcripts)
    kept: list[torch.dtype] = []

    def heard(errors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        kept.append(errors.dtype)
        return products(errors, gradient)

    monkeypatch.setattr(mixed, "products", heard)
    monkeypatch.setattr(mixed, "free_bytes", lambda device: 0)
    half = measure(checkpoint, transcripts)
    assert set(kept) == {torch.bfloat16}
    for name, listed in whole.items():
        size = max(float(np.abs(option.changes).max()) for option in listed)
        for one, other in zip(listed, half[name], strict=True):
            assert np.allclose(one.changes, other.changes, atol=0.01 * size)


def test_with_an_importance_matrix_there_are_two_ways(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    weights = {"blk.0.attn_q.weight": np.linspace(0.01, 1, 64).astype(np.float32)}
    plain, both = measure(checkpoint, transcripts), measure(checkpoint, transcripts, importance=weights)
    for name, listed in plain.items():
        without = [option for option in both[name] if not option.weighed]
        assert [option.kind for option in without] == [option.kind for option in listed]
        assert all(np.allclose(a.changes, b.changes) for a, b in zip(listed, without, strict=True))
        weighed = {option.kind: option for option in both[name] if option.weighed}
        assert set(weighed) == ({"Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0"} if name in weights else set())
        assert not any(
            np.allclose(option.changes, weighed[option.kind].changes) for option in without if weighed.get(option.kind)
        )


def test_the_matrix_is_left_out_where_it_does_harm(make_checkpoint: Make, transcripts: list[Transcript]) -> None:
    folder = make_checkpoint()
    means = collect_importance(folder, transcripts, dataset="made up").means()
    found = measure(open_checkpoint(folder), transcripts)
    types = dict.fromkeys(found, "Q4_0")
    choice = choose_weighed(folder, transcripts, types=types, importance=means)
    chosen = list(choice.options.values())
    assert {option.kind for option in chosen} == {"Q4_0"}
    both = measure(open_checkpoint(folder), transcripts, types=types, importance=means)
    plain = [listed[0] for listed in both.values()]
    assert not any(option.weighed for option in plain)
    assert objective(chosen) <= 1.1 * objective(plain)  # the layers' own errors may cost that much
    assert (
        np.square(choice.unseen).sum() <= np.square(np.sum([option.changes for option in plain], axis=0)).sum() * 1.001
    )
    told = choice.describe()
    assert told["written_with_imatrix"] == sorted(n for n, option in choice.options.items() if option.weighed)
    assert told["expected_margin_error"] > 0


def two_ways(*, helps: bool) -> dict[str, list[Option]]:
    """Twenty matrices whose weighed rounding is either half of the plain one or another draw as large."""
    draw = np.random.default_rng(5)
    made = {}
    for number in range(20):
        plain, other = draw.standard_normal((2, 8))
        weighed = plain / 2 if helps else other
        made[f"matrix {number}"] = [Option("Q4_0", 10, plain), Option("Q4_0", 10, weighed, weighed=True)]
    return made


def test_what_only_seems_to_help_is_left_out() -> None:
    """Of twenty draws some always cancel on eight transcripts; on others they do not."""
    by_luck = settle(two_ways(helps=False))
    assert not any(option.weighed for option in by_luck.options.values())
    both = two_ways(helps=True)
    helped = settle(both)
    assert sum(option.weighed for option in helped.options.values()) > 10
    together = np.sum([listed[0].changes for listed in both.values()], axis=0)
    assert np.square(helped.unseen).sum() < np.square(together).sum()


@pytest.mark.parametrize("bits", [4.7, 5.5, 6.5])
def test_the_target_holds_and_beats_one_type_for_all(
    bits: float, make_checkpoint: Make, transcripts: list[Transcript]
) -> None:
    folder = make_checkpoint()
    chosen = list(choose_types(folder, transcripts, bits=bits).options.values())
    found = measure(open_checkpoint(folder), transcripts)
    for kind in ("Q4_0", "Q5_0"):
        alike = [next(option for option in listed if option.kind == kind) for listed in found.values()]
        if sum(option.bytes for option in alike) <= sum(option.bytes for option in chosen):
            assert objective(chosen) < 0.7 * objective(alike)


def test_names() -> None:
    assert (target_bits("auto:4.5bpw"), target_bits("AUTO:5"), target_bits("Q4_0")) == (4.5, 5.0, None)
    assert kinds_for(40) == ["F16"]
    assert "Q4_K" in kinds_for(512)
    assert "Q4_K" not in kinds_for(576)


def test_command_writes_the_chosen_types(
    checkpoint_of: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = checkpoint_of("llama-tied")
    made = [Transcript(tuple(range(3 + n, 60 + n)), (7 if n % 2 else 9,), str(n)) for n in range(6)]
    write_transcripts(tmp_path / "transcripts.jsonl", made)
    out = tmp_path / "model.gguf"
    words = [str(source), "-o", str(out), "--type", "auto:5.5bpw", "--template", "gramlite"]
    told = CliRunner().invoke(
        command, [*words, "--calibration", str(tmp_path / "transcripts.jsonl")], catch_exceptions=False
    )
    assert json.loads(told.stdout)["quantization"] == "auto:5.5bpw"
    header = read_header(out)
    assert 5.0 < bits_per_weight(header) <= 5.5
    manifest = read_manifest(out)
    assert manifest is not None
    made = choose_transcripts(made)  # in the order in which the command takes them
    means = collect_importance(source, made, dataset="made up").means()
    wanted = choose_types(source, made, bits=5.5, importance=means).options
    found = {tensor.name: tensor.type for tensor in header.tensors if len(tensor.shape) > 1}
    assert found == {name: option.kind for name, option in wanted.items()}
    assert manifest.settings["written_with_imatrix"] == [name for name in sorted(wanted) if wanted[name].weighed]
    assert len(set(found.values())) > 1
    assert manifest.calibration is not None
    assert manifest.calibration["transcripts"] == 6
    assert manifest.settings["target_bits_per_weight"] == 5.5
    again = [
        *words,
        "--type",
        "auto:7bpw",
        "--force",
        "--embedding-type",
        "Q8_0",
        "--calibration",
        str(tmp_path / "transcripts.jsonl"),
    ]
    CliRunner().invoke(command, again, catch_exceptions=False)
    header = read_header(out)
    assert next(tensor.type for tensor in header.tensors if tensor.name == "token_embd.weight") == "Q8_0"
    assert 6.5 < bits_per_weight(header) <= 7
    with pytest.raises(InputError, match="Add --calibration"):
        CliRunner().invoke(command, [*words, "--force"], catch_exceptions=False)
