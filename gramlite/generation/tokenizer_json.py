"""The vocabulary of a tokenizer.json, through the `tokenizers` package, with nothing of its special parsing.

The added tokens are taken out before the tokenizer is made, so that no text can ever become one of them: they are ours
to place, by id (see prompt.py). Truncation and padding are taken out too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from gramlite.errors import ModelError
from gramlite.formats.model_folder import END_LITERALS, ModelFolder, read_json_object


class TokenizerVocabulary:
    """A byte-level tokenizer.json. Use `read_vocabulary`."""

    def __init__(self, path: Path, description: dict[str, Any], *, size: int, ends: frozenset[int]) -> None:
        added = [entry for entry in description.get("added_tokens") or [] if isinstance(entry, dict)]
        literals = {str(entry.get("content")): entry for entry in added if entry.get("content")}
        self.special_tokens: Mapping[str, int] = {text: int(entry["id"]) for text, entry in literals.items()}
        known = {self.special_tokens[text] for text in END_LITERALS if text in self.special_tokens}
        self.end_tokens = frozenset(known | {end for end in ends if end < size})
        self.size = size
        plain = description | {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{path} is no usable tokenizer ({error}). Download it again.") from error
        words = self._tokenizer.get_vocab(with_added_tokens=False)
        highest = max([*words.values(), *self.special_tokens.values()], default=-1)
        if highest >= size:
            raise ModelError(
                f"{path} has the token id {highest:,} and the model only {size:,}. They don't belong together."
            )
        self._words = {index: word for word, index in words.items()}
        self._pieces = {
            self.special_tokens[text]: b"" if entry.get("special") else text.encode("utf-8")
            for text, entry in literals.items()
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = bytes(BYTES[character] for character in self._words.get(token, ""))
        return known


def read_vocabulary(folder: ModelFolder, size: int) -> TokenizerVocabulary:
    """The tokenizer of a model's folder, for a model with `size` token ids.

    Raises ModelError where there is no tokenizer.json, or one that is not byte-level.
    """
    path = folder.path / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder.path} has no tokenizer.json. Put the tokenizer beside the weights.")
    description = read_json_object(path)
    if not _is_byte_level(description.get("pre_tokenizer")):
        raise ModelError(
            f"{path} is no byte-level tokenizer, the only kind this backend reads. "
            "Type: gramlite export gguf CHECKPOINT -o judge.gguf, which runs other kinds too."
        )
    return TokenizerVocabulary(path, description, size=size, ends=folder.ends)


def _is_byte_level(pre_tokenizer: Any) -> bool:
    if not isinstance(pre_tokenizer, dict):
        return False
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    return isinstance(steps, list) and any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps)


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_alphabet()
