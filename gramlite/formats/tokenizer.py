"""A checkpoint's tokenizer as GGUF stores it: tokens, types, merges or scores, special ids, the pre-tokenizer's name.

tokenizer.json is the authority. What llama.cpp would tokenize differently is refused by name, for a judge that reads
other tokens than it was trained on is wrong without a word.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gramlite.errors import ModelError

from .gguf_vocabulary import UNUSED, GgufVocabulary, checked_vocab, place_tokens, template_ends
from .model_folder import read_json_object
from .sentencepiece import is_sentencepiece, read_sentencepiece

GPT2_WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
LLAMA3_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("\\p{N}{1,3}", "\\p{N}")
# the splits a tokenizer makes one after another, whether a whole word's token goes before its merges -> llama.cpp's name
PRE_TOKENIZERS = {
    ((LLAMA3_WORDS,), True): "llama-bpe",
    ((LLAMA3_WORDS,), False): "smaug-bpe",
    ((QWEN2_WORDS,), False): "qwen2",
    (("\\p{N}", GPT2_WORDS), False): "smollm",
    ((GPT2_WORDS,), False): "gpt-2",
}


def read_vocabulary(folder: Path, config: dict[str, Any], size: int) -> GgufVocabulary:
    """The tokenizer of a checkpoint folder, padded to the model's `size` rows of embeddings.

    Raises ModelError, which names it, for an unknown pre-tokenizer, an unknown tokenizer model, a token that occurs
    twice (llama.cpp would abort) or more tokens than embeddings.
    """
    settings = (
        read_json_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    path = folder / "tokenizer.json"
    if not path.is_file() and not (folder / "tokenizer.model").is_file():
        raise ModelError(
            f"{folder} has neither tokenizer.json nor tokenizer.model. Put the tokenizer beside the weights."
        )
    tokenizer = read_json_object(path) if path.is_file() else {}
    if not tokenizer or is_sentencepiece(tokenizer):
        vocabulary = read_sentencepiece(folder, tokenizer, settings)
    else:
        vocabulary = read_byte_level(path, tokenizer)
    vocabulary = replace(
        vocabulary,
        special=special_ids(vocabulary.tokens, settings, config, vocabulary.special),
        chat_templates=read_chat_templates(folder, settings),
    )
    return pad_vocabulary(path, vocabulary, size)


def read_byte_level(path: Path, tokenizer: dict[str, Any]) -> GgufVocabulary:
    """A byte-level BPE tokenizer.json."""
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise ModelError(
            f"{path} has the tokenizer model {kind!r}; only BPE can be exported. Export another checkpoint."
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ModelError(
                f"{path} has {key} = {model[key]!r}, which llama.cpp's byte-level BPE does not do. Export another checkpoint."
            )
    pre = pre_tokenizer_name(path, tokenizer, ignore_merges=bool(model.get("ignore_merges")))
    normalizer = normalizer_name(path, tokenizer.get("normalizer"))
    vocab = checked_vocab(path, model.get("vocab"))
    tokens, types, notes = place_tokens(path, vocab, tokenizer.get("added_tokens") or [])
    known = {token: index for index, token in enumerate(tokens)}
    add_bos, add_eos, bos = template_ends(tokenizer.get("post_processor"), known)
    return GgufVocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=read_merges(path, model.get("merges")),
        special={"bos": bos} if bos is not None else {},
        add_bos=add_bos,
        add_eos=add_eos,
        normalizer=normalizer,
        notes=tuple(notes),
    )


def pre_tokenizer_name(path: Path, tokenizer: dict[str, Any], *, ignore_merges: bool) -> str:
    """llama.cpp's name of the pre-tokenizer that makes the same splits; ModelError shows the one that is unknown."""
    splits = word_splits(tokenizer.get("pre_tokenizer"))
    name = PRE_TOKENIZERS.get((splits, ignore_merges)) if splits is not None else None
    if name is None:
        shown = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
        raise ModelError(
            f"{path} has a pre-tokenizer that is unknown here (ignore_merges {str(ignore_merges).lower()}): {shown[:600]}. "
            f"Known are those of {', '.join(PRE_TOKENIZERS.values())}. Export a checkpoint with one of them."
        )
    return name


def word_splits(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The patterns by which a pre_tokenizer entry splits text, in order, ending in bytes; None where it does anything else."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        return None
    patterns: list[str] = []
    for step in steps[:-1]:
        if step.get("type") == "Digits" and step.get("individual_digits") is True:
            patterns.append("\\p{N}")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            if not isinstance(pattern, dict) or set(pattern) != {"Regex"}:
                return None
            patterns.append(str(pattern["Regex"]))
        else:
            return None
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    return tuple([*patterns, GPT2_WORDS] if last.get("use_regex", True) else patterns)


def normalizer_name(path: Path, normalizer: Any) -> str | None:
    steps = (
        normalizer.get("normalizers")
        if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence"
        else [normalizer]
    )
    kinds = [step.get("type") if isinstance(step, dict) else step for step in steps or [None]]
    if kinds in ([None], ["NFC"]):
        return None if kinds == [None] else "NFC"
    raise ModelError(
        f"{path} has the normalizer {kinds}; only none and NFC can be exported. Export another checkpoint."
    )


def read_merges(path: Path, merges: Any) -> list[str]:
    """Merges as `left right`, whether the file has them as strings or as pairs."""
    joined = []
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part and " " not in part for part in parts)
        ):
            raise ModelError(f"{path} has the unusable merge {merge!r}. Download it again.")
        joined.append(" ".join(parts))
    if not joined:
        raise ModelError(f"{path} has no merges. Download it again.")
    return joined


def special_ids(
    tokens: list[str], settings: dict[str, Any], config: dict[str, Any], found: dict[str, int]
) -> dict[str, int]:
    """Special ids: the one the tokenizer itself puts first, then tokenizer_config.json's names, then config.json's ids."""
    known = {token: index for index, token in enumerate(tokens)}
    special = {}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        index: Any = config.get(f"{key}_id")
        index = index[0] if isinstance(index, list) and index else index
        chosen: Any = found.get(name, known.get(token) if isinstance(token, str) else None)
        chosen = index if chosen is None else chosen
        if type(chosen) is int and 0 <= chosen < len(tokens):
            special[name] = chosen
    return special


def read_chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name; chat_template.jinja goes before tokenizer_config.json's entry."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8-sig")}
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read ({error}). Download it again.") from error
    stored = settings.get("chat_template")
    if stored is None and (folder / "chat_template.json").is_file():
        stored = read_json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(stored, str):
        return {"default": stored}
    entries = [entry for entry in stored if isinstance(entry, dict)] if isinstance(stored, list) else []
    return {
        str(entry["name"]): str(entry["template"]) for entry in entries if entry.get("name") and entry.get("template")
    }


def pad_vocabulary(path: Path, vocabulary: GgufVocabulary, size: int) -> GgufVocabulary:
    """Name the ids that have no token, up to the model's `size`; refuse what llama.cpp could not load."""
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    if len(tokens) > size:
        raise ModelError(
            f"{path} has {len(tokens):,} tokens and the model {size:,} embeddings. Put the tokenizer that belongs to the weights there."
        )
    tokens += [""] * (size - len(tokens))
    types += [UNUSED] * (size - len(types))
    tokens = [token or f"[PAD{index}]" for index, token in enumerate(tokens)]
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if "\0" in token:
            raise ModelError(
                f"{path}: the token {index} holds a NUL character, which GGUF cannot store. Export another checkpoint."
            )
        if seen.setdefault(token, index) != index:
            raise ModelError(f"{path} has the token {token!r} twice, as {seen[token]} and {index}. Remove one of them.")
    scores = vocabulary.scores + [-1e9] * (size - len(vocabulary.scores)) if vocabulary.scores else []
    return replace(vocabulary, tokens=tokens, types=types, scores=scores)
