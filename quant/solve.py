"""GPTQ: quantize one column after the other, and let the columns still to come make up for each one's error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from gramlite.errors import InputError, ModelError
from gramlite.formats.quantized_linear import SUPPORTED_BITS, QuantizedLinear

from .grid import Grid, choose_grid

if TYPE_CHECKING:
    import torch

Order = Literal["none", "static", "full"]
ORDERS = get_args(Order)
WHOLE_ROW = -1  # AutoGPTQ's and its followers' word for a group that is a row
BLOCK_COLUMNS = 128
DAMPING_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class GptqSettings:
    """How to quantize a linear layer.

    `group_size` weights of a row share a scale, all of them where it is -1. `order` is the order in which columns are
    quantized: as they stand ("none"), by falling activation within groups of neighbours ("static"), or with the groups
    themselves made of columns of like activation ("full", the classic desc_act, which only the GPTQ format can hold).
    `damping` is the share of the mean diagonal added to the second
    moment. `search` clips group extremes where that lowers the weighted error. With `sequential` each layer is
    calibrated on what the already quantized layers before it put out; with `focus` tokens count by how much the
    verdict hangs on them. `exceptions` are pairs of a part of a layer's name and the bits that layers so named take
    instead; the last that fits counts.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    order: Order = "static"
    damping: float = 0.01
    search: bool = True
    sequential: bool = True
    focus: bool = True
    exceptions: tuple[tuple[str, int], ...] = ()

    def of(self, name: str) -> GptqSettings:
        """The settings of one layer by its name; 8-bit exceptions are symmetric, the only kind that GGUF has."""
        for part, bits in reversed(self.exceptions):
            if part in name:
                return replace(self, bits=bits, symmetric=self.symmetric or bits == 8)
        return self

    def group_of(self, columns: int) -> int:
        """The group size in a layer with so many inputs."""
        return columns if self.group_size == WHOLE_ROW else self.group_size

    def check(self, name: str, rows: int, columns: int) -> None:
        """Raise InputError unless a layer of rows x columns can be quantized and packed so."""
        if self.bits not in SUPPORTED_BITS:
            raise InputError(f"{self.bits} bits are not supported; --bits is one of 2, 3, 4, 8.")
        if self.group_of(columns) < 1 or columns % self.group_of(columns):
            fitting = [size for size in (16, 32, 64, 96, 128, 192, 256) if columns % size == 0]
            raise InputError(
                f"--group-size {self.group_size} does not divide the {columns} inputs of {name}. "
                f"Sizes that do: {', '.join(map(str, fitting)) or columns}, or -1 for whole rows."
            )
        if columns * self.bits % 32 or rows * self.bits % 32:
            raise InputError(f"{name} is {rows} x {columns}, which {self.bits}-bit codes do not fill to whole words.")


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a second moment: the column order, the damped diagonal, the inverse's upper Cholesky factor."""

    order: torch.Tensor
    importance: torch.Tensor
    upper: torch.Tensor


def factorize(moment: torch.Tensor, settings: GptqSettings) -> Factor:
    """Factor a second moment [in, in]; raises ModelError where it is not finite or stays singular."""
    import torch

    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0 or mean == float("inf"):
        raise ModelError(
            "The inputs of a layer are all zero, or not finite: the checkpoint or the calibration is broken."
        )
    columns = torch.arange(len(diagonal), device=moment.device)
    order = columns if settings.order == "none" else torch.argsort(diagonal, descending=True, stable=True)
    damping = settings.damping
    for _ in range(DAMPING_TRIES):
        damped = moment[order.unsqueeze(1), order]
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these is as large as the moment
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return Factor(order, diagonal + damping * mean, upper)
        damping = max(10 * damping, 1e-4)
    raise ModelError("A layer's second moment stays singular under damping; use more calibration tokens.")


def solve(weight: torch.Tensor, factor: Factor, settings: GptqSettings) -> QuantizedLinear:
    """Quantize weight [out, in] against a factored second moment of its inputs."""
    import torch

    rows, columns = weight.shape
    size = settings.group_of(columns)
    slots = torch.arange(columns, device=weight.device)
    groups = slots // size if settings.order == "full" else factor.order // size  # of each, in solving order
    group_of = groups.tolist()
    work = weight.float().T[factor.order].contiguous()  # [in, out]: a column of the weight is a row here
    codes = torch.empty_like(work)
    scales, zeros = torch.empty(2, columns // size, rows, device=weight.device)
    ahead = settings.order == "static" or size > 8 * BLOCK_COLUMNS
    if ahead:
        seen = factor.order if settings.order == "full" else slots
        grid = round_grid(weight[:, seen], factor.importance[seen], settings)
        scales, zeros = grid.scales.squeeze(-1).T.contiguous(), grid.zeros.squeeze(-1).T.contiguous()
    block_columns = BLOCK_COLUMNS if ahead else size * max(1, BLOCK_COLUMNS // size)
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        block, upper = work[start:stop], factor.upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            group = group_of[start + column]
            if not ahead and (start + column) % size == 0:
                importance = factor.importance[factor.order[start + column : start + column + size]]
                grid = round_grid(block[column : column + size].T, importance, settings)
                scales[group], zeros[group] = grid.scales.flatten(), grid.zeros.flatten()
            grid = Grid(scales[group], zeros[group])
            chosen = grid.round(block[column], settings.bits)
            codes[start + column] = chosen
            errors[column] = (block[column] - grid.place(chosen)).div_(upper[column, column])
            block[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
        work[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1)
    return _neutral(codes.T, scales.T, zeros.T, groups, factor.order, settings)


def round_grid(weight: torch.Tensor, importance: torch.Tensor, settings: GptqSettings) -> Grid:
    """The grids, [out, groups, 1], of all groups of neighbouring columns of weight [out, in]."""
    size = settings.group_of(weight.shape[1])
    return choose_grid(
        weight.float().unflatten(-1, (-1, size)),
        importance.unflatten(-1, (-1, size)),
        bits=settings.bits,
        symmetric=settings.symmetric,
        search=settings.search,
    )


def round_to_nearest(weight: torch.Tensor, settings: GptqSettings) -> QuantizedLinear:
    """The plain baseline: grids that keep every group's extreme, codes by rounding, no calibration."""
    import torch

    columns = torch.arange(weight.shape[1], device=weight.device)
    grid = round_grid(weight, torch.ones_like(weight[0]), replace(settings, search=False))
    size = settings.group_of(len(columns))
    codes = grid.round(weight.float().unflatten(-1, (-1, size)), settings.bits).flatten(1)
    return _neutral(codes, grid.scales.squeeze(-1), grid.zeros.squeeze(-1), columns // size, columns, settings)


def relative_error(
    weight: torch.Tensor, quantized: QuantizedLinear, moment: torch.Tensor, *, energy: float | None = None
) -> float:
    """The share of the layer's output energy that quantization loses: |XW - XW'|^2 / |XW|^2 over the calibration.

    `energy` is |XW|^2 where it is known already, from `output_energy`.
    """
    import torch

    weight = weight.float()
    change = torch.from_numpy(quantized.dequantize()).to(weight.device).sub_(weight)
    return output_energy(change, moment) / (output_energy(weight, moment) if energy is None else energy)


def output_energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """|XW|^2, from the second moment of X."""
    weight = weight.float()
    return float((weight @ moment).mul_(weight).sum())


def _neutral(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    order: torch.Tensor,
    settings: GptqSettings,
) -> QuantizedLinear:
    """Put columns back into their own order and leave torch."""
    import torch

    back = torch.argsort(order)
    return QuantizedLinear(
        codes=codes[:, back].to(torch.uint8).cpu().numpy(),
        scales=scales.half().cpu().numpy(),
        zeros=zeros.to(torch.uint8).cpu().numpy(),
        group_index=groups[back].int().cpu().numpy(),
        bits=settings.bits,
        group_size=settings.group_of(codes.shape[1]),
    )
