"""llama.cpp's tokenizer of one model, and what else judging reads in its file."""

from __future__ import annotations

import ctypes
import os
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp

from gramlite.errors import GramliteError, ModelError
from gramlite.formats.gguf_header import Header
from gramlite.formats.quantization import quantization_name
from gramlite.interrupt import uninterrupted

from .library import first_words, forget_words, start_library

MARKED = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED

SPECIAL = {"unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}  # as GGUF spells them


class LlamaVocabulary:
    """The vocabulary of an open model, for any thread. It has to be closed before the model is."""

    def __init__(self, model: Any, *, normalize: bool) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._own_model: Any = None
        self._lock = threading.Lock()
        self._open = True
        self._normalize = normalize
        self._buffer = ctypes.create_string_buffer(1024)
        self._pieces: dict[int, bytes] = {}
        self.size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        special = [t for t in range(self.size) if llama_cpp.llama_vocab_get_attr(self._vocab, t) & MARKED]
        self.special_tokens: Mapping[str, int] = {
            llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"): token for token in special
        }
        ends = [token for token in special if llama_cpp.llama_vocab_is_eog(self._vocab, token)]
        self.end_tokens = frozenset([*ends, int(llama_cpp.llama_vocab_eos(self._vocab))])

    @classmethod
    @uninterrupted()
    def of_file(cls, path: Path, *, normalize: bool) -> LlamaVocabulary:
        """The vocabulary without the weights, for as long as the process runs or until `close`."""
        start_library()
        forget_words()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ModelError(f"llama.cpp could not load {path}: {first_words()}. Export or download it again.")
        vocabulary = cls(model, normalize=normalize)
        vocabulary._own_model = model
        return vocabulary

    @uninterrupted()
    def close(self) -> None:
        """Let nobody ask the model any more, and free what `of_file` loaded."""
        with self._lock:
            self._open = False
            if self._own_model:
                llama_cpp.llama_model_free(self._own_model)
            self._own_model = None

    def encode(self, text: str) -> list[int]:
        if self._normalize:
            text = unicodedata.normalize("NFC", text)
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        with self._asking():
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, False, False)
        if count < 0:
            raise GramliteError(f"llama.cpp could not tokenize a text of {len(data)} bytes.")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            with self._asking():
                length = llama_cpp.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, False)
                known = self._pieces[token] = self._buffer.raw[: max(length, 0)]
        return known

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            if not self._open:
                raise GramliteError("This judge is closed. Load it again with gramlite.load(...).")
            yield


def judging_metadata(header: Header) -> dict[str, Any]:
    """What judging wants to know of a GGUF file: its quantization, templates, and the two tokens templates may name."""
    values = header.metadata
    tokens = values.get("tokenizer.ggml.tokens")

    def literal(kind: str) -> str:
        index = values.get(f"tokenizer.ggml.{kind}_token_id")
        return tokens[index] if isinstance(index, int) and isinstance(tokens, tuple) else ""

    template = {key: values.get(f"gramlite.template.{key}") for key in ("name", "sha256", "text")}
    return {
        "quantization": quantization_name(header),
        "chat_template": values.get("tokenizer.chat_template"),
        "template": template if any(template.values()) else None,
        "bos": literal("bos"),
        "eos": literal("eos"),
        "special": {f"{name}_token": literal(key) for name, key in SPECIAL.items()},
    }
