"""SentencePiece tokenizers (Llama 2): pieces, scores and types from tokenizer.model, else from tokenizer.json.

llama.cpp merges the adjacent pair whose piece has the highest score; Hugging Face merges by a ranked list of pairs.
The two agree only when the list holds every pair that makes a piece, grouped by piece, so anything else is refused.
Format of tokenizer.model: sentencepiece_model.proto of the SentencePiece project (protocol buffers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gramlite.errors import ModelError

from .model_folder import MAX_JSON_BYTES
from .tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Vocabulary, checked_vocab, place_tokens, template_ends

SPACE = "▁"
BPE_MODEL = 2  # TrainerSpec.ModelType
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE: characters with a fallback to bytes, no byte-level alphabet."""
    model = tokenizer.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def read_sentencepiece(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a checkpoint with a SentencePiece tokenizer; special ids are added by the caller."""
    model = folder / "tokenizer.model"
    if not tokenizer:
        return from_model_alone(model, settings)
    path = folder / "tokenizer.json"
    prefix = space_prefix(path, tokenizer)
    vocab = checked_vocab(path, tokenizer["model"].get("vocab"))
    tokens, types, notes = place_tokens(path, vocab, tokenizer.get("added_tokens") or [])
    if model.is_file():
        pieces, _ = read_model_file(model)
        for index, (piece, _, _) in enumerate(pieces):
            if index >= len(tokens) or tokens[index] != piece:
                raise ModelError(
                    f"{model} and {path.name} differ at id {index} ({piece!r}). Remove the one that is out of date."
                )
        scores = [score for _, score, _ in pieces]
    else:
        special = {token for token, kind in zip(tokens, types, strict=True) if kind != NORMAL}
        scores = scores_from_merges(path, vocab, tokenizer["model"].get("merges"), special)
    known = {token: index for index, token in enumerate(tokens)}
    add_bos, add_eos, bos = template_ends(tokenizer.get("post_processor"), known)
    unknown = tokenizer["model"].get("unk_token")
    types = [piece_type(token, kind, unknown) for token, kind in zip(tokens, types, strict=True)]
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores + [-1e9] * (len(tokens) - len(scores)),
        special={"bos": bos} if bos is not None else {},
        add_bos=add_bos,
        add_eos=add_eos,
        space_prefix=prefix,
        notes=tuple(notes),
    )


def from_model_alone(path: Path, settings: dict[str, Any]) -> Vocabulary:
    """A checkpoint that has tokenizer.model and no tokenizer.json."""
    pieces, prefix = read_model_file(path)
    vocab = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    decoder = settings.get("added_tokens_decoder") or {}
    added = [
        {**entry, "id": int(index)} for index, entry in decoder.items() if isinstance(entry, dict) and index.isdigit()
    ]
    beyond = [entry for entry in added if entry["id"] >= len(pieces)]
    tokens, types, notes = place_tokens(path, vocab, beyond)
    types[: len(pieces)] = [kind for _, _, kind in pieces]
    bos = next((index for index, token in enumerate(tokens) if token == "<s>"), None)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=[score for _, score, _ in pieces] + [-1e9] * (len(tokens) - len(pieces)),
        special={"bos": bos} if bos is not None else {},
        add_bos=settings.get("add_bos_token", True) is True,
        add_eos=settings.get("add_eos_token") is True,
        space_prefix=prefix,
        notes=tuple(notes),
    )


def space_prefix(path: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether every stretch of text gets a space put before it; refuses other ways of treating spaces."""
    normalizer = tokenizer.get("normalizer")
    steps = (
        normalizer.get("normalizers")
        if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence"
        else [normalizer]
    )
    if tokenizer.get("pre_tokenizer") is None and steps in ([PREPEND, REPLACE_SPACES], [REPLACE_SPACES]):
        return len(steps) == 2
    metaspace = tokenizer.get("pre_tokenizer")
    if normalizer is None and isinstance(metaspace, dict) and metaspace.get("type") == "Metaspace":
        if (
            metaspace.get("replacement") == SPACE
            and metaspace.get("prepend_scheme") == "never"
            and metaspace.get("split") is False
        ):
            return False
    raise ModelError(
        f"{path} has a SentencePiece pre-tokenizer that llama.cpp does otherwise: normalizer {normalizer!r}, "
        f"pre_tokenizer {metaspace!r}. "
        "Save the tokenizer with legacy=True, or export another checkpoint."
    )


def piece_type(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    if kind == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return kind


def scores_from_merges(path: Path, vocab: dict[str, int], merges: Any, special: set[str]) -> list[float]:
    """Scores by id such that llama.cpp merges in the list's order; refuses a list that is not SentencePiece's."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges or []]
    fault = ModelError(
        f"{path} has merges that are not SentencePiece's own, so llama.cpp would merge differently. "
        "Put the tokenizer.model beside it if the checkpoint has one, or export another checkpoint."
    )
    if not pairs or any(len(pair) != 2 or not all(isinstance(part, str) for part in pair) for pair in pairs):
        raise fault
    ranks: dict[str, int] = {}
    previous = None
    for left, right in pairs:
        piece = left + right
        if piece not in vocab or (piece != previous and piece in ranks):
            raise fault
        ranks.setdefault(piece, len(ranks))
        previous = piece
    listed = set(pairs)
    for piece in vocab.keys() - special:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if any(pair not in listed for pair in cuts if pair[0] in vocab and pair[1] in vocab):
            raise fault
    scores = [-1e9] * (max(vocab.values()) + 1)
    for piece, index in vocab.items():
        scores[index] = -float(ranks.get(piece, len(ranks) + index))
    return scores


def read_model_file(path: Path) -> tuple[list[tuple[str, float, int]], bool]:
    """(piece, score, type) by id and whether a space is put before the text, from a SentencePiece BPE model file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is far too large")
        data = path.read_bytes()
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in fields(data):
            if number == 1:
                entry = dict(fields(value))
                pieces.append(
                    (entry[1].decode("utf-8"), struct.unpack("<f", entry.get(2, b"\0\0\0\0"))[0], entry.get(3, NORMAL))
                )
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(fields(value))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is no SentencePiece model ({error}). Download it again.") from error
    if not pieces or any(kind not in (NORMAL, UNKNOWN, CONTROL, 4, UNUSED, BYTE) for _, _, kind in pieces):
        raise ModelError(f"{path} has no usable pieces. Download it again.")
    if trainer.get(3, 1) != BPE_MODEL:
        raise ModelError(
            f"{path} is a SentencePiece model of a kind other than BPE, which Llama does not use. Export "
            "another checkpoint."
        )
    if normalizer.get(2) or normalizer.get(4, 1):
        raise ModelError(
            f"{path} normalizes text in a way that GGUF cannot express for Llama. Export another checkpoint."
        )
    return pieces, bool(normalizer.get(3, 1))


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol-buffers message: (number, integer or bytes), lengths checked against the data."""
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        if key & 7 == 0:
            value, position = varint(data, position)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, position = varint(data, position)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError("an unknown wire type")
        if position + size > len(data):
            raise ValueError("a field runs past the end")
        yield key >> 3, data[position : position + size]
        position += size


def varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        value |= (data[position] & 0x7F) << shift
        position += 1
        if not data[position - 1] & 0x80:
            return value, position
    raise ValueError("a number runs past the end")
