"""The names of quantizations, as llama.cpp writes them."""

from __future__ import annotations

import math
from collections import Counter

from .gguf_header import Header

# general.file_type of a GGUF file → llama.cpp's name (enum llama_ftype in llama.h)
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip


def quantization_name(header: Header) -> str:
    """A GGUF file's quantization: what it declares, else the type that most of its bytes have."""
    declared = header.metadata.get("general.file_type")
    if isinstance(declared, int) and declared in FILE_TYPES:
        return FILE_TYPES[declared]
    held: Counter[str] = Counter()
    for tensor in header.tensors:
        held[tensor.type] += tensor.bytes
    return held.most_common(1)[0][0]


def bits_per_weight(header: Header) -> float:
    """Bits a weight takes on average, over all tensors."""
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors)
    return 8 * sum(tensor.bytes for tensor in header.tensors) / weights
