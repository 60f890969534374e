"""Quantized layers as the blocks of other formats, bit for bit: GGUF's Q4_0, Q4_1 and Q8_0, and ONNX MatMulNBits.

Formats: ggml-common.h (block_q4_0, block_q4_1, block_q8_0) and the operator MatMulNBits of onnxruntime's contrib ops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gramlite.errors import ModelError

from .quantized_linear import QuantizedLinear

BLOCK = 32  # weights in a block of these GGUF types
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def gguf_type(name: str, linear: QuantizedLinear) -> str:
    """The GGUF type that holds a layer without loss; raises ModelError, which says what to do, where there is none.

    2- and 3-bit codes fit into the 4-bit types, which saves nothing but runs everywhere.
    """
    if not linear.ordered:
        raise ModelError(
            f"{name} has its groups in activation order (desc_act), which GGUF cannot express. "
            "Quantize without it; gramlite's own order keeps groups in place."
        )
    if linear.group_size % BLOCK:
        raise ModelError(
            f"{name} has groups of {linear.group_size}, and GGUF's blocks are {BLOCK} weights. "
            f"Quantize with a --group-size that is a multiple of {BLOCK}."
        )
    if linear.bits == 8 and not linear.symmetric:
        raise ModelError(f"{name} has 8-bit codes with zero points, which no GGUF type holds. Use --symmetric.")
    if linear.bits == 8:
        return "Q8_0"
    if linear.symmetric:
        return "Q4_0"
    minimum = -linear.scales.astype(np.float32) * linear.zeros
    if not np.array_equal(minimum.astype(np.float16).astype(np.float32), minimum):
        raise ModelError(
            f"{name} has zero points times scales that float16, and so GGUF's Q4_1, cannot hold. "
            "Quantize with gramlite, which chooses scales that fit."
        )
    return "Q4_1"


def gguf_blocks(linear: QuantizedLinear, kind: str) -> npt.NDArray[np.uint8]:
    """A layer as GGUF blocks of type `kind`, uint8 [out, in / 32 * bytes of a block].

    Q4_0: f16 d, 16 bytes of codes, w = d * (q - 8). Q4_1: f16 d, f16 m, 16 bytes, w = d * q + m. Q8_0: f16 d, 32
    signed bytes, w = d * q. In the 4-bit types byte j holds weight j in its low half and weight j + 16 in its high one.
    """
    rows, columns = linear.codes.shape
    codes = linear.codes.reshape(rows, -1, BLOCK)
    repeat = linear.group_size // BLOCK
    scales = np.repeat(linear.scales, repeat, axis=1)[..., None]
    if kind == "Q8_0":
        parts = [_bytes(scales), (codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8)]
    else:
        parts = [_bytes(scales)]
        if kind == "Q4_1":
            minimum = -linear.scales.astype(np.float32) * linear.zeros
            parts.append(_bytes(np.repeat(minimum.astype(np.float16), repeat, axis=1)[..., None]))
        else:
            codes = codes + np.uint8(8 - (1 << (linear.bits - 1)))
        parts.append(codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << np.uint8(4)))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _bytes(values: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8)


def matmul_nbits(name: str, linear: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
    """The inputs of onnxruntime's MatMulNBits: B [out, groups, bytes] uint8, scales [out * groups] float32, and where
    the zero point is not the middle code, zero_points [out, bytes] uint8; low halves first.

    Raises ModelError for groups or code sizes that the operator does not have.
    """
    check_matmul_nbits(name, linear)
    rows = len(linear.codes)
    packed: dict[str, npt.NDArray[Any]] = {
        "B": pack_bytes(linear.codes.reshape(rows, -1, linear.group_size), linear.bits),
        "scales": linear.scales.astype(np.float32).reshape(-1),
    }
    if not linear.symmetric:
        packed["zero_points"] = pack_bytes(linear.zeros, linear.bits)
    return packed


def check_matmul_nbits(name: str, linear: QuantizedLinear) -> None:
    """Raise ModelError for a layer that MatMulNBits cannot express."""
    if not linear.ordered:
        raise ModelError(f"{name} has its groups in activation order (desc_act), which MatMulNBits cannot express.")
    if linear.group_size < 16 or linear.group_size & (linear.group_size - 1):
        raise ModelError(f"{name} has groups of {linear.group_size}; MatMulNBits takes powers of two from 16.")
    if linear.bits not in (4, 8):
        raise ModelError(f"{name} has {linear.bits}-bit codes; MatMulNBits runs 4 and 8 bits on every device.")


def pack_bytes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """4-bit codes two to a byte along the last axis, the first in the low half; 8-bit codes as they are."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: npt.NDArray[np.uint8] = codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))
    return packed
