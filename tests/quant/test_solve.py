"""GPTQ's solver against a textbook version of it, its grids, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gramlite.quant.grid import choose_grid
from gramlite.quant.solve import GptqSettings, factorize, relative_error, round_grid, round_to_nearest, solve

from gramlite.errors import InputError, ModelError

CHOICES = list(itertools.product((2, 3, 4, 8), (True, False), ("none", "static", "full")))


def layer(rows: int = 96, columns: int = 128, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of inputs that are correlated and of unlike size, as in a transformer."""
    torch.manual_seed(3)
    inputs = torch.randn(tokens, columns // 4) @ torch.randn(columns // 4, columns) + 0.3 * torch.randn(tokens, columns)
    inputs *= torch.exp(torch.randn(columns))
    weight = torch.randn(rows, columns) * 0.02
    weight[torch.rand_like(weight) < 0.002] *= 8
    return weight, inputs.T @ inputs


@pytest.mark.parametrize(("bits", "symmetric", "order"), CHOICES)
def test_error_is_below_round_to_nearest(bits: int, symmetric: bool, order: str) -> None:
    weight, moment = layer()
    settings = GptqSettings(bits=bits, group_size=32, symmetric=symmetric, order=order)  # type: ignore[arg-type]
    quantized = solve(weight, factorize(moment, settings), settings)
    plain = relative_error(weight, round_to_nearest(weight, settings), moment)
    assert relative_error(weight, quantized, moment) < 0.6 * plain
    assert quantized.symmetric == symmetric
    assert quantized.ordered == (order != "full")


def test_codes_are_those_of_the_textbook() -> None:
    """Optimal brain quantization, column by column, with the inverse itself in float64 instead of its factor."""
    weight, moment = layer(rows=24, columns=64)
    settings = GptqSettings(group_size=16, order="static", search=False)
    factor = factorize(moment, settings)
    grid = round_grid(weight, factor.importance, settings)
    inverse = torch.linalg.inv(moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(64))
    work = weight.double().clone()
    codes = torch.zeros(24, 64)
    for column in torch.argsort(moment.diagonal(), descending=True).tolist():
        scale, zero = grid.scales[:, column // 16, 0].double(), grid.zeros[:, column // 16, 0]
        codes[:, column] = (work[:, column] / scale + zero).round().clamp(0, 15)
        error = work[:, column] - (codes[:, column] - zero) * scale
        work -= error.unsqueeze(1) * inverse[column] / inverse[column, column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (torch.from_numpy(solve(weight, factor, settings).codes) != codes).float().mean() < 0.002


def test_weighty_inputs_lose_less() -> None:
    """A twentieth of the inputs, of another kind than the rest, is served better when it counts more."""
    weight, _ = layer()
    many = torch.randn(1900, 20) @ torch.randn(20, 128)
    few = torch.randn(100, 20) @ torch.randn(20, 128) * 0.3
    settings = GptqSettings(group_size=32)
    errors = []
    for share in (1.0, 100.0):
        moment = many.T @ many + share * few.T @ few
        quantized = solve(weight, factorize(moment, settings), settings)
        errors.append(relative_error(weight, quantized, few.T @ few))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_independent_inputs_leave_nothing_to_make_up_for(symmetric: bool) -> None:
    weight, _ = layer()
    settings = GptqSettings(group_size=32, symmetric=symmetric, search=False)
    quantized = solve(weight, factorize(torch.eye(128), settings), settings)
    assert np.array_equal(quantized.dequantize(), round_to_nearest(weight, settings).dequantize())


def test_search_lowers_the_weighted_error_of_every_group() -> None:
    weight, moment = layer()
    groups, importance = weight.unflatten(1, (-1, 32)), moment.diagonal().unflatten(0, (-1, 32))
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        errors = []
        for search in (False, True):
            grid = choose_grid(groups, importance, bits=bits, symmetric=symmetric, search=search)
            errors.append(((grid.place(grid.round(groups, bits)) - groups) ** 2 * importance).sum(-1))
        assert (errors[1] <= errors[0]).all()
        assert errors[1].sum() < 0.98 * errors[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_minimum_of_an_asymmetric_grid_is_a_float16(bits: int) -> None:
    """GGUF's Q4_1 stores scale * zero as float16; nothing may be lost there."""
    torch.manual_seed(5)
    weight = torch.randn(4000, 1, 32) * torch.exp(4 * torch.randn(4000, 1, 1)).clamp(max=1000)
    weight[::7] = weight[::7].abs()
    weight[::11] = -weight[::11].abs()
    weight[::13] = 0
    weight[::17] *= 1e-6
    for search in (True, False):
        grid = choose_grid(weight, torch.ones(1, 32), bits=bits, symmetric=False, search=search)
        assert torch.equal(grid.scales.half().float(), grid.scales)
        minimum = grid.scales * grid.zeros
        assert torch.equal(minimum.half().float(), minimum)
        assert grid.zeros.min() >= 1
        assert grid.zeros.max() <= (1 << bits) - 1
        assert not grid.place(grid.round(weight, bits))[::13].any()


def test_plain_grid_keeps_the_extreme_of_every_group() -> None:
    weight, _ = layer()
    quantized = round_to_nearest(weight.half().float(), GptqSettings(group_size=32))
    groups = weight.unflatten(1, (-1, 32))
    extreme = groups.abs().amax(-1)
    kept = torch.from_numpy(quantized.dequantize()).unflatten(1, (-1, 32)).abs().amax(-1)
    assert torch.allclose(kept, extreme, rtol=1e-3)


def test_inputs_that_never_occur_are_rounded() -> None:
    weight, moment = layer()
    moment[:, 5] = moment[5] = 0
    settings = GptqSettings(group_size=32)
    quantized = solve(weight, factorize(moment, settings), settings)
    codes = np.clip(np.round(weight[:, 5].numpy() / quantized.scales[:, 0].astype(np.float32) + 8), 0, 15)
    assert np.array_equal(quantized.codes[:, 5], codes)


def test_fewer_tokens_than_inputs_still_factor() -> None:
    inputs = torch.randn(20, 128)
    settings = GptqSettings(damping=0.0)
    assert torch.isfinite(factorize(inputs.T @ inputs, settings).upper).all()


def test_refusals() -> None:
    with pytest.raises(ModelError, match="all zero, or not finite"):
        factorize(torch.zeros(8, 8), GptqSettings())
    with pytest.raises(ModelError, match="all zero, or not finite"):
        factorize(torch.full((8, 8), torch.nan), GptqSettings())
    with pytest.raises(InputError, match=r"128 does not divide the 576 inputs of q.*16, 32, 64, 96, 192"):
        GptqSettings(group_size=128).check("q", 576, 576)
    with pytest.raises(InputError, match="one of 2, 3, 4, 8"):
        replace(GptqSettings(), bits=5).check("q", 576, 576)
    with pytest.raises(InputError, match="whole words"):
        GptqSettings(bits=3, group_size=16).check("q", 48, 64)
    GptqSettings(bits=3).check("q", 576, 576)
