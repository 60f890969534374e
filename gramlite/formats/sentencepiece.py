"""SentencePiece tokenizers (Llama 2): pieces, scores and types from tokenizer.model, else from tokenizer.json.

llama.cpp merges the adjacent pair whose piece has the highest score; Hugging Face merges by a ranked list of pairs.
The two agree only when the list holds every pair that makes a piece, grouped by piece, so anything else is refused.
tokenizer.model is read with the `sentencepiece` package (protocol buffers, sentencepiece_model.proto).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gramlite.errors import InputError, ModelError

from .gguf_vocabulary import BYTE, NORMAL, UNKNOWN, GgufVocabulary, checked_vocab, place_tokens, template_ends
from .model_folder import MAX_JSON_BYTES

SPACE = "▁"
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE: characters with a fallback to bytes, no byte-level alphabet."""
    model = tokenizer.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def read_sentencepiece(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> GgufVocabulary:
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
    return GgufVocabulary(
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


def from_model_alone(path: Path, settings: dict[str, Any]) -> GgufVocabulary:
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
    return GgufVocabulary(
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
        f"{path} has a SentencePiece pre-tokenizer that llama.cpp does otherwise: normalizer {normalizer!r}, pre_tokenizer {metaspace!r}. "
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
    """(piece, score, type) by id and whether a space is put before the text, from a SentencePiece BPE model file.

    Raises InputError where the packages that read it are missing.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except Exception as error:  # ImportError, or protobuf's own where the two packages' releases do not fit
        raise InputError(
            f"{path} is read with the packages sentencepiece and protobuf ({error}). Type: pip install --upgrade 'gramlite[gguf]'"
        ) from error
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is far too large")
        model = ModelProto.FromString(path.read_bytes())
        pieces = [(entry.piece, entry.score, entry.type) for entry in model.pieces]
    except (OSError, ValueError, DecodeError) as error:
        raise ModelError(f"{path} is no SentencePiece model ({error}). Download it again.") from error
    if not all(piece for piece, _, _ in pieces) or not pieces:
        raise ModelError(f"{path} has no usable pieces. Download it again.")
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise ModelError(
            f"{path} is a SentencePiece model of a kind other than BPE, which Llama does not use. Export another checkpoint."
        )
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ModelError(
            f"{path} normalizes text in a way that GGUF cannot express for Llama. Export another checkpoint."
        )
    return pieces, normalizer.add_dummy_prefix
