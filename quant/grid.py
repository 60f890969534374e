"""Choosing the grid of each group of weights: its float16 scale and its integer zero point.

Without a search the grid keeps the group's extreme exactly, as round-to-nearest does. With one, the
extreme is clipped a little where that lowers the squared error, each column weighted by its importance
(the diagonal of the inputs' second moment).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = 2.0**-24  # float16's smallest step
HALF_MANTISSA_BITS = 11
SHRINK_STEPS = 24
SHRINK_TO = {2: 0.3, 3: 0.45, 4: 0.55, 8: 0.9}  # wider grids gain nothing by clipping deep


@dataclass(frozen=True)
class Grid:
    """Scales, float32 that float16 holds exactly, and zeros, whole numbers; both broadcast against the weights."""

    scales: torch.Tensor
    zeros: torch.Tensor

    def round(self, weight: torch.Tensor, bits: int) -> torch.Tensor:
        """The nearest codes, as whole numbers in the weight's own dtype."""
        return (weight / self.scales).add_(self.zeros).round_().clamp_(0, (1 << bits) - 1)

    def place(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights that codes stand for."""
        return (codes - self.zeros).mul_(self.scales)


def choose_grid(weight: torch.Tensor, importance: torch.Tensor, *, bits: int, symmetric: bool, search: bool) -> Grid:
    """The grid, [rows, groups, 1], of weight [rows, groups, columns].

    With `search` it is the one of least squared error, each column weighted by importance [groups, columns].
    """
    import torch

    make = _symmetric_candidates if symmetric else _asymmetric_candidates
    candidates = make(weight, bits, search)
    best = next(candidates)
    if not search:
        return best
    lowest = _error(weight, importance, best, bits)
    for candidate in candidates:
        error = _error(weight, importance, candidate, bits)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        scales, zeros = (
            torch.where(better, candidate.scales, best.scales),
            torch.where(better, candidate.zeros, best.zeros),
        )
        best = Grid(scales, zeros)
    return best


def _error(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, bits: int) -> torch.Tensor:
    difference = grid.place(grid.round(weight, bits)).sub_(weight).square_()
    return difference.mul_(importance).sum(-1, keepdim=True)


def _shrinks(bits: int, search: bool) -> list[float]:
    """How far the extremes are clipped in the grids to try, first not at all."""
    steps = SHRINK_STEPS if search else 0
    return [1 - (1 - SHRINK_TO[bits]) * step / SHRINK_STEPS for step in range(steps + 1)]


def _symmetric_candidates(weight: torch.Tensor, bits: int, search: bool) -> Iterator[Grid]:
    """Codes -half .. half-1 and a scale of either sign: the extreme on the long side, or on the short."""
    import torch

    half = 1 << (bits - 1)
    extreme = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    zeros = torch.full_like(extreme, half)
    for shrink in _shrinks(bits, search):
        yield Grid(half_scale(extreme * (-shrink / half)), zeros)
        if search:
            yield Grid(half_scale(extreme * (shrink / (half - 1))), zeros)


def _asymmetric_candidates(weight: torch.Tensor, bits: int, search: bool) -> Iterator[Grid]:
    import torch

    top = (1 << bits) - 1
    high = weight.amax(-1, keepdim=True).clamp_(min=0)
    # a zero point is at least 1, so that the grid goes one step below nothing even where no weight does
    low = torch.minimum(weight.amin(-1, keepdim=True), high / -(top - 1))
    for shrink in _shrinks(bits, search):
        scale = (high - low) * (shrink / top)
        zero = (low * -shrink / scale.clamp(min=SMALLEST_SCALE)).round_().clamp_(1, top)
        for shift in (0, -1, 1) if search else (0,):
            moved = (zero + shift).clamp_(1, top)
            yield Grid(half_scale(scale, moved, bits), moved)


def half_scale(scale: torch.Tensor, zero: torch.Tensor | None = None, bits: int = 0) -> torch.Tensor:
    """Round scales to float16 and away from nothing; with zero points, so that scale * zero is float16 too.

    GGUF's Q4_1 stores the product as a float16 minimum. An odd part of n bits in the zero point costs the
    scale n of its 11 mantissa bits; grids of 8 bits have no such twin and keep them all.
    """
    import torch

    if zero is not None and bits <= 4:
        mantissa, exponent = torch.frexp(scale)
        places = torch.exp2(kept_bits(zero))
        scale = torch.ldexp((mantissa * places).round_() / places, exponent)
    half = scale.half().float()
    tiny = half.abs() < SMALLEST_SCALE
    return torch.where(tiny, torch.full_like(half, SMALLEST_SCALE), half)


def kept_bits(zero: torch.Tensor) -> torch.Tensor:
    """How many mantissa bits are left to the scale that belongs to each zero point of at most 4 bits."""
    import torch

    odd = zero.clone()
    for _ in range(3):
        odd = torch.where(odd % 2 == 0, odd / 2, odd)
    return HALF_MANTISSA_BITS - torch.where(odd > 1, odd.log2().floor_() + 1, torch.zeros_like(odd))
