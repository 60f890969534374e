"""A prompt as segments, and its token ids: scaffold tokens as ids, untrusted text never as anything but text.

The prompt is tokenized as one text, so that merges across a segment's border come out as the model was trained. Only
special tokens whose literal lies wholly in trusted text become their id. A literal that touches untrusted text is
cut after its first character and its fragments are encoded apart, which no tokenizer reads as the special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gramlite.errors import InputError

from .vocabulary import Vocabulary

PROMPT_ENCODING = 2  # one more wherever the same input comes to be shown to a model in another way


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt; `field` names the input it came from and is None for our own, trusted text."""

    text: str
    field: str | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids, and the special-token literals that were defused: (field, literal)."""

    tokens: tuple[int, ...]
    literals: tuple[tuple[str, str], ...]


def encode_prompt(vocabulary: Vocabulary, segments: Sequence[Segment]) -> EncodedPrompt:
    """Tokenize segments as one text; see the module's docstring.

    Raises InputError where untrusted text holds a special token of one character, which cannot be cut.
    """
    text = "".join(segment.text for segment in segments)
    pattern = special_pattern(tuple(vocabulary.special_tokens))
    owner = _Owner(segments)
    tokens: list[int] = []
    defused: list[tuple[str, str]] = []
    done = at = 0
    while pattern and (match := pattern.search(text, at)):
        field = owner.untrusted(match.start(), match.end())
        if field is None:
            tokens += _encode_plain(vocabulary, text[done : match.start()])
            tokens.append(vocabulary.special_tokens[match.group()])
            done = at = match.end()
            continue
        if len(match.group()) == 1:
            raise InputError(f"{field} holds {match.group()!r}, which is a special token of this model; remove it.")
        defused.append((field, match.group()))
        cut = match.start() + 1
        tokens += _encode_plain(vocabulary, text[done:cut])
        done = at = cut
    tokens += _encode_plain(vocabulary, text[done:])
    return EncodedPrompt(tuple(tokens), tuple(defused))


def encode_trusted(vocabulary: Vocabulary, text: str) -> list[int]:
    """Token ids of our own text, in which special-token literals stand for their ids."""
    return list(encode_prompt(vocabulary, [Segment(text)]).tokens)


def _encode_plain(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.encode(text) if text else []


@lru_cache(maxsize=8)
def special_pattern(literals: tuple[str, ...]) -> re.Pattern[str] | None:
    """A pattern that finds the leftmost, longest special-token literal."""
    ordered = sorted((literal for literal in literals if literal), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class _Owner:
    """Says which untrusted field, if any, a stretch of the joined text touches."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._spans: list[tuple[int, int, str]] = []
        start = 0
        for segment in segments:
            end = start + len(segment.text)
            if segment.field is not None:
                self._spans.append((start, end, segment.field))
            start = end

    def untrusted(self, start: int, end: int) -> str | None:
        return next((field for low, high, field in self._spans if start < high and low < end), None)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts share from their beginning."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    low, high = 0, limit  # the prefixes of length low are equal, those of length high are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low
