"""Compares llama.cpp's tokenization of a written GGUF with the checkpoint's own tokenizer, string by string."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import unicodedata
from pathlib import Path
from typing import Any

from gramlite.errors import ModelError
from gramlite.interrupt import uninterrupted

PROBES = (
    "Hello world", " leading space", "trailing space ", "two  spaces   three", "\n", "\n\n", "\n \n",
    "\t\ttabs\tand\nlines\r\n", "I'm you're she'll we've they'd it's don't", "I'M YOU'RE SHE'LL WE'VE THEY'D IT'S",
    "1", "12", "123", "1234", "12345678901", "3.14159 2,718 1/2 ½ ² Ⅷ ٣٤ ४५", "año café naïve Ångström ﬁ straße",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย", "中文，日本語のテキスト。한국어", "👍🏽 👨‍👩‍👧‍👦 🇺🇦 ☺️",
    "def f(x):\n    return x**2  # comment\n", "if (a<=b&&c!=d) { e->f += 0x1F; }",
    "<think>\nFeedback:\n", "</think>\n<answer>\nA\n</answer>", "[User Question]\n[The Start of Assistant A's Response]",
    "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "a\u00a0b\u2003c\u3000d", "…—“quoted”‘x’", "$100 50% #tag @name user@example.org https://example.org/?q=1&r=2",
    "_under_score__ CamelCaseWORDS", "\\begin{equation} \\frac{a}{b} \\end{equation}", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...;;;", "\u200bzero\u200dwidth\ufeff",
)  # fmt: skip


def compare_tokenizers(gguf: Path, folder: Path) -> int | None:
    """How many strings both tokenize alike; None where the package `tokenizers` or a tokenizer.json is not there.

    Raises ModelError with the first string on which they differ.
    """
    if importlib.util.find_spec("tokenizers") is None or not (folder / "tokenizer.json").is_file():
        return None
    import tokenizers

    try:
        source = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{folder / 'tokenizer.json'} cannot be read ({error}). Download it again.") from error
    added = [token.content for token in source.get_added_tokens_decoder().values()]
    probes = [unicodedata.normalize("NFC", text) for text in (*PROBES, *(f"a{token}b {token}" for token in added[:64]))]
    for text, ids in zip(probes, tokenize_with_llama(gguf, probes), strict=True):
        wanted = source.encode(text, add_special_tokens=False).ids
        if ids != wanted:
            raise ModelError(
                f"llama.cpp tokenizes {text!r} as {ids[:40]} and the checkpoint's tokenizer as {wanted[:40]}, "
                "so a judge would read other tokens than it was trained on. Export another checkpoint."
            )
    return len(probes)


@uninterrupted()
def tokenize_with_llama(gguf: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of texts by a GGUF's own tokenizer, special literals recognized, nothing added around them."""
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(gguf), params)
    if not model:
        raise ModelError(f"llama.cpp could not load the tokenizer of {gguf}. Export another checkpoint.")
    try:
        return [_tokenize(llama_cpp, model, text.encode("utf-8")) for text in texts]
    finally:
        llama_cpp.llama_model_free(model)


@functools.cache  # llama.cpp keeps calling it, so it must stay alive
def _silence() -> Any:
    import llama_cpp

    def ignore(level: int, text: bytes, data: object) -> None:
        return

    return llama_cpp.llama_log_callback(ignore)


def _tokenize(llama_cpp: Any, model: Any, data: bytes) -> list[int]:
    room = len(data) + 16
    tokens = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), data, len(data), tokens, room, False, True)
    if count < 0:
        raise ModelError(f"llama.cpp could not tokenize a text of {len(data)} bytes. Export another checkpoint.")
    return list(tokens[:count])
