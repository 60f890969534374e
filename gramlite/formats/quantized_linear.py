"""The neutral form of a quantized linear layer, which every packer reads and no packer changes.

weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])   with g = group_index[i]

Scales are float16, codes and zero points are integers, so that the product is exact in float32 and every file format
that stores the three dequantizes to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gramlite.errors import ModelError

SUPPORTED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes [out, in] uint8, scales [out, groups] float16, zeros [out, groups] uint8, group_index [in] int32.

    A zero point lies in 1 .. 2**bits - 1: GPTQ files store it less one, and their readers add the one again without
    masking, so that 0 would come back as 2**bits. Scales of either sign are allowed.
    Raises ModelError where shapes, types or ranges do not fit each other.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8]
    group_index: npt.NDArray[np.int32]
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = columns // self.group_size
        problems = {
            "bits": self.bits not in SUPPORTED_BITS,
            "group size": groups * self.group_size != columns,
            "scales": self.scales.shape != (rows, groups) or self.scales.dtype != np.float16,
            "zeros": self.zeros.shape != (rows, groups) or self.zeros.dtype != np.uint8,
            "codes": self.codes.dtype != np.uint8 or int(self.codes.max(initial=0)) >= 1 << self.bits,
            "scales, which are not finite": not np.isfinite(self.scales).all(),
            "group_index": self.group_index.shape != (columns,) or not self._indices_are_groups(groups),
        }
        for name, wrong in problems.items():
            if wrong:
                raise ModelError(f"A quantized layer of {rows} x {columns} has unusable {name}.")

    def _indices_are_groups(self, groups: int) -> bool:
        return 0 <= int(self.group_index.min(initial=0)) and int(self.group_index.max(initial=0)) < groups

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return bool(np.all(self.zeros == 1 << (self.bits - 1)))

    @property
    def ordered(self) -> bool:
        """Whether groups are runs of neighbouring columns, which formats made of blocks need."""
        return bool(np.array_equal(self.group_index, natural_groups(self.codes.shape[1], self.group_size)))

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weight [out, in] in float32, exact."""
        offset = self.codes.astype(np.float32) - self.zeros[:, self.group_index].astype(np.float32)
        return offset * self.scales[:, self.group_index].astype(np.float32)


def natural_groups(columns: int, group_size: int) -> npt.NDArray[np.int32]:
    """The group of each column where groups are runs of neighbours."""
    return (np.arange(columns) // group_size).astype(np.int32)
