"""A tokenizer as GGUF stores it, and what its two kinds of readers share: the places of tokens, what stands around a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gramlite.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """A tokenizer as GGUF's `tokenizer.ggml.*` keys hold it.

    `model` is gpt2 (byte-level BPE) or llama (SentencePiece); `special` maps bos, eos, unknown and padding to ids;
    `normalizer` is NFC where the text has to be normalized before llama.cpp sees it; `notes` are for people.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: bool | None = None
    normalizer: str | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def checked_vocab(path: Path, vocab: Any) -> dict[str, int]:
    if (
        not isinstance(vocab, dict)
        or not vocab
        or not all(type(index) is int and index >= 0 for index in vocab.values())
    ):
        raise ModelError(f"{path} has no usable vocabulary. Download it again.")
    return vocab


def place_tokens(path: Path, vocab: dict[str, int], added: list[Any]) -> tuple[list[str], list[int], list[str]]:
    """Tokens and types by id: the vocabulary, over it the added tokens, empty strings where an id has none."""
    by_id = {index: token for token, index in vocab.items()}
    types = dict.fromkeys(by_id, NORMAL)
    notes = []
    for entry in added:
        content, index = (entry.get(key) if isinstance(entry, dict) else None for key in ("content", "id"))
        if not isinstance(content, str) or not content or type(index) is not int or index < 0:
            raise ModelError(f"{path} has the unusable added token {entry!r}. Download it again.")
        by_id[index] = content
        types[index] = CONTROL if entry.get("special") else USER_DEFINED
        stripping = [key for key in ("lstrip", "rstrip", "single_word") if entry.get(key)]
        if stripping:
            notes.append(f"the added token {content!r} has {stripping[0]}, which llama.cpp does not do around it")
    size = max(by_id) + 1
    if size > 4 * len(by_id):
        raise ModelError(
            f"{path} gives a token the id {size - 1:,}, far beyond its {len(by_id):,} tokens. Download it again."
        )
    return [by_id.get(index, "") for index in range(size)], [types.get(index, UNUSED) for index in range(size)], notes


def template_ends(post_processor: Any, known: dict[str, int]) -> tuple[bool, bool, int | None]:
    """Whether encoding puts one token before the text and one after it, and the id of the one before."""
    steps = [post_processor]
    if isinstance(post_processor, dict) and post_processor.get("type") == "Sequence":
        steps = post_processor.get("processors") or []
    single: list[Any] = []
    for step in steps:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            single = step.get("single") or []
    names = [
        item.get("SpecialToken", {}).get("id") if "SpecialToken" in item else None
        for item in single
        if isinstance(item, dict)
    ]
    if None not in names:
        return False, False, None
    text = names.index(None)
    before, after = names[:text], names[text + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise ModelError(
            f"The tokenizer puts {before + after} around a text; GGUF can say one token on each side. Export another checkpoint."
        )
    return bool(before), bool(after), known.get(str(before[0])) if before else None
