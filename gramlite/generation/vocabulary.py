"""What judging needs of a model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Vocabulary(Protocol):
    """A model's tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every CONTROL or USER_DEFINED token's literal text and id."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a generation."""
        ...

    @property
    def size(self) -> int:
        """How many token ids there are."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of text that holds no special token's literal; nothing is added around them."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for a CONTROL token."""
        ...
