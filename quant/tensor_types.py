"""The types of llama.cpp: of whole files, of single tensors, and what a user may ask of either."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gramlite.errors import InputError
from gramlite.formats.ggml_types import GGML_TYPES

from .ggml import FILE_TYPE_NUMBERS, TYPE_NUMBERS
from .source import EXACT, ExactModel

SHORT_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def file_type(name: str) -> str:
    """llama.cpp's name of a file type, whatever its case; raises InputError that lists them for an unknown one."""
    known = SHORT_NAMES.get(name.upper(), name.upper())
    if known not in FILE_TYPE_NUMBERS:
        raise InputError(f"There is no type {name!r}. --type is one of {', '.join(FILE_TYPE_NUMBERS)}.")
    return known


def tensor_type(name: str) -> str:
    """ggml's name of a tensor type; raises InputError that lists them for an unknown one."""
    if name.upper() not in TYPE_NUMBERS or not GGML_TYPES[TYPE_NUMBERS[name.upper()]].weight:
        known = [kind.name for kind in GGML_TYPES.values() if kind.weight]
        raise InputError(f"A tensor cannot be of type {name!r}. There are {', '.join(known)}.")
    return name.upper()


def check_overrides(source: ExactModel, kind: str, overrides: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The overrides with llama.cpp's names; raises InputError for one that cannot be, or would change nothing."""
    if overrides and kind in EXACT:
        raise InputError(f"llama.cpp knows no types for single tensors in a file of {kind}. Take a quantized --type.")
    for pattern, _ in overrides:
        try:
            fits = any(re.search(pattern, name) for name in source.matrices)
        except re.error as error:
            raise InputError(f"{pattern!r} is no regular expression ({error}).") from error
        if not fits:
            raise InputError(f"No matrix of {source.path.name} has a name with {pattern!r} in it, such as attn_v.")
    return tuple((pattern, tensor_type(name)) for pattern, name in overrides)


def named_overrides(
    source: ExactModel, texts: Sequence[str], embedding: str | None, head: str | None
) -> list[tuple[str, str]]:
    """The command line's overrides, those of the embedding and the head first; a tied head is the embedding."""
    named = [(EMBEDDING, embedding), (HEAD if HEAD in source.matrices else EMBEDDING, head)]
    exact = [(f"^{re.escape(name)}$", kind) for name, kind in named if kind]
    return exact + [parse_override(text) for text in texts]


def parse_override(text: str) -> tuple[str, str]:
    """`attn_v=Q8_0` as a pattern and a type; raises InputError for anything else."""
    pattern, equals, kind = text.rpartition("=")
    if not pattern or not equals or not kind:
        raise InputError(f"--tensor-type {text} is not PATTERN=TYPE, such as attn_v=Q8_0.")
    return pattern, tensor_type(kind)
