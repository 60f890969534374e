"""Tokenizers: the same ids from llama.cpp as from the checkpoint's own tokenizer, and refusals of unknown ones."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gramlite.errors import InputError, ModelError
from gramlite.formats.gguf_vocabulary import GgufVocabulary
from gramlite.formats.gguf_writer import add_vocabulary
from gramlite.formats.tokenization import compare_tokenizers, tokenize_with_llama
from gramlite.formats.tokenizer import read_vocabulary

WriteTokenizer = Callable[[Path, str], int]


def write_vocabulary(path: Path, vocabulary: GgufVocabulary) -> Path:
    """A GGUF that holds nothing but a tokenizer, enough for llama.cpp's vocab_only."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_head_count(1)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def export_vocabulary(folder: Path, size: int) -> tuple[Path, GgufVocabulary]:
    vocabulary = read_vocabulary(folder, {}, size)
    return write_vocabulary(folder / "vocabulary.gguf", vocabulary), vocabulary


@pytest.mark.parametrize("style", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_500_strings_get_the_same_ids(
    style: str, tokenizer_folder: WriteTokenizer, strings: list[str], tmp_path: Path
) -> None:
    import tokenizers

    path, vocabulary = export_vocabulary(tmp_path, tokenizer_folder(tmp_path, style))
    assert vocabulary.pre == style
    source = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(strings) == 500
    differing = [
        text
        for text, ids in zip(strings, tokenize_with_llama(path, strings), strict=True)
        if ids != source.encode(text, add_special_tokens=False).ids
    ]
    assert differing == []


def test_the_reference_tokenizer_gets_the_same_ids(strings: list[str], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    import gramlite

    folder = Path(gramlite.__file__).with_name("data") / "reference" / "hf"
    path = write_vocabulary(tmp_path / "vocabulary.gguf", read_vocabulary(folder, {}, 49152))
    source = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = [source.encode(text, add_special_tokens=False).ids for text in strings]
    assert tokenize_with_llama(path, strings) == wanted


def test_bos_is_added_where_the_tokenizer_adds_it(tokenizer_folder: WriteTokenizer, tmp_path: Path) -> None:
    _, llama = export_vocabulary(tmp_path / "llama", tokenizer_folder(tmp_path / "llama", "llama-bpe"))
    _, qwen = export_vocabulary(tmp_path / "qwen", tokenizer_folder(tmp_path / "qwen", "qwen2"))
    assert llama.add_bos and llama.tokens[llama.special["bos"]] == "<|begin_of_text|>"
    assert not qwen.add_bos and qwen.normalizer == "NFC"


def test_a_wrong_pre_tokenizer_is_noticed(tokenizer_folder: WriteTokenizer, tmp_path: Path) -> None:
    from dataclasses import replace

    vocabulary = read_vocabulary(tmp_path, {}, tokenizer_folder(tmp_path, "llama-bpe"))
    wrong = write_vocabulary(tmp_path / "wrong.gguf", replace(vocabulary, pre="gpt-2"))
    with pytest.raises(ModelError, match="tokenizes .* as"):
        compare_tokenizers(wrong, tmp_path)
    right = write_vocabulary(tmp_path / "right.gguf", vocabulary)
    assert (compare_tokenizers(right, tmp_path) or 0) > 30


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown split": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+|\p{N}{1,4}"),
        r"pre-tokenizer that is unknown.*\{1,4\}",
    ),
    "other pre-tokenizer": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "unknown.*Whitespace"),
    "no pre-tokenizer": (lambda t: t.update(pre_tokenizer=None), "unknown here.*null"),
    "space prefix": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "unknown here.*add_prefix_space",
    ),
    "merges ignored": (lambda t: t["model"].update(ignore_merges=True), "ignore_merges true"),
    "normalizer": (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer.*Lowercase"),
    "model": (lambda t: t["model"].update(type="Unigram"), "Unigram"),
    "dropout": (lambda t: t["model"].update(dropout=0.1), "dropout"),
    "merges": (lambda t: t["model"].update(merges=[]), "no merges"),
    "repeated token": (
        lambda t: t["added_tokens"].append({"id": 5, "content": "<think>", "special": False}),
        "'<think>' twice",
    ),
    "far id": (lambda t: t["added_tokens"].append({"id": 10**9, "content": "<x>", "special": False}), "1,000,000,000"),
    "too many tokens": (
        lambda t: t["added_tokens"].append({"id": len(t["model"]["vocab"]) + 6, "content": "<x>", "special": False}),
        "embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_llama_cpp_does_otherwise_is_refused(name: str, tokenizer_folder: WriteTokenizer, tmp_path: Path) -> None:
    change, message = REFUSALS[name]
    size = tokenizer_folder(tmp_path, "qwen2")
    with pytest.raises(ModelError, match=message):
        read_vocabulary(edited(tmp_path, change), {}, size)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither tokenizer.json nor tokenizer.model"):
        read_vocabulary(tmp_path, {}, 100)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ModelError, match="tokenizer.json cannot be read"):
        read_vocabulary(tmp_path, {}, 100)


def sentencepiece_json(folder: Path, *, complete: bool = True) -> int:
    """A small Llama-2-like tokenizer.json: characters with byte fallback, merges of every pair that makes a piece."""
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=["▁"])
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        ["the quick brown fox is better than the other response, isn't it? 12 été 你好"] * 3, trainer
    )
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocab = {
        token: index
        for index, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    for token, _ in sorted(learned, key=lambda item: (len(item[0]) == 1, item[1])):  # pieces first, characters last
        vocab.setdefault(token, len(vocab))
    pieces = [token for token in vocab if len(token) > 1 and not token.startswith("<")]
    merges = [[p[:cut], p[cut:]] for p in pieces for cut in range(1, len(p)) if p[:cut] in vocab and p[cut:] in vocab]
    added = [
        {"id": i, "content": text, "special": True, "normalized": False}
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ]
    for entry in added:
        entry |= {"single_word": False, "lstrip": False, "rstrip": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    template = {"single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None, "decoder": None,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "post_processor": {
            "type": "TemplateProcessing", **template, "pair": template["single"],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": merges if complete else merges[::2],
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return len(vocab)


def sentencepiece_model(folder: Path, *, model_type: int = 2) -> None:
    """A tokenizer.model (protocol buffers, written by hand) with the pieces of the folder's tokenizer.json."""
    import struct

    def entry(number: int, data: bytes) -> bytes:
        size, prefix = len(data), b""
        while size > 127:
            prefix, size = prefix + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + prefix + bytes([size]) + data

    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    data = b""
    for token, index in sorted(vocab.items(), key=lambda item: item[1]):
        kind = 2 if index == 0 else 3 if index < 3 else 6 if index < 259 else 1
        data += entry(
            1, entry(1, token.encode()) + b"\x15" + struct.pack("<f", -float(index)) + b"\x18" + bytes([kind])
        )
    data += entry(2, b"\x18" + bytes([model_type])) + entry(3, b"\x18\x01\x20\x00\x28\x01")
    (folder / "tokenizer.model").write_bytes(data)


SPM_STRINGS = [
    "the quick brown fox",
    " the  other",
    "response, isn't it? 12",
    "été 你好 👍",
    "",
    "x\ny",
    "the<s>quick</s> fox",
    "tttthhhheee",
]


@pytest.mark.parametrize("source", ["tokenizer.json", "both", "tokenizer.model"])
def test_sentencepiece_tokenizers_get_the_same_ids(source: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    size = sentencepiece_json(tmp_path)
    original = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if source != "tokenizer.json":
        sentencepiece_model(tmp_path)
    if source == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    path, vocabulary = export_vocabulary(tmp_path, size)
    assert (vocabulary.model, vocabulary.add_bos, vocabulary.space_prefix) == ("llama", True, True)
    assert vocabulary.types[:4] == [2, 3, 3, 6]
    wanted = [original.encode(text, add_special_tokens=False).ids for text in SPM_STRINGS]
    assert tokenize_with_llama(path, SPM_STRINGS) == wanted


def test_sentencepiece_refusals(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    size = sentencepiece_json(tmp_path, complete=False)
    with pytest.raises(ModelError, match="not SentencePiece's own"):
        read_vocabulary(tmp_path, {}, size)
    sentencepiece_model(tmp_path, model_type=1)
    with pytest.raises(ModelError, match="other than BPE"):
        read_vocabulary(tmp_path, {}, size)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\xff")
    with pytest.raises(ModelError, match="no SentencePiece model"):
        read_vocabulary(tmp_path, {}, size)
    edited(
        tmp_path, lambda t: t.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "prepend_scheme": "first"})
    )
    with pytest.raises(ModelError, match="llama.cpp does otherwise"):
        read_vocabulary(tmp_path, {}, size)


def test_a_model_file_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    size = sentencepiece_json(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    assert read_vocabulary(tmp_path, {}, size).model == "llama", "tokenizer.json alone takes none"
    sentencepiece_model(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.model is read with .*gramlite\[gguf\]"):
        read_vocabulary(tmp_path, {}, size)


def test_strings_are_in_nfc(strings: list[str]) -> None:
    assert all(unicodedata.is_normalized("NFC", text) for text in strings)
