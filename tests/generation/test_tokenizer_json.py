"""The vocabulary of a tokenizer.json: the same ids as llama.cpp, nothing special in untrusted text, honest refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="needs the package tokenizers: pip install 'gramlite[hf]'")

import tokenizers

import gramlite
from gramlite.errors import ModelError
from gramlite.formats.model_folder import read_model_folder
from gramlite.generation.prompt import encode_trusted
from gramlite.generation.tokenizer_json import TokenizerVocabulary, read_vocabulary

HF = Path(gramlite.__file__).parent / "data" / "reference" / "hf"
TEXTS = ("Hello world", " 1234 lines\n\n\tof code(x)  ", "naïve café — “quotes” 你好 👍🏽", "a\u00a0b\u200bc", "")


@pytest.fixture(scope="module")
def vocabulary() -> TokenizerVocabulary:
    return read_vocabulary(read_model_folder(HF), 49152)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_pieces_are_those_of_the_package(vocabulary: TokenizerVocabulary, text: str) -> None:
    whole = tokenizers.Tokenizer.from_file(str(HF / "tokenizer.json"))
    ids = vocabulary.encode(text)
    assert ids == whole.encode(text, add_special_tokens=False).ids
    assert b"".join(vocabulary.piece(token) for token in ids).decode() == text


def test_llama_cpp_has_the_same_vocabulary(vocabulary: TokenizerVocabulary, reference_q8: Path) -> None:
    from gramlite.backends.gguf.backend import open_artifact
    from gramlite.formats.artifact import Artifact
    from gramlite.runtime.options import RuntimeOptions

    backend = open_artifact(Artifact(reference_q8, "gguf", None), RuntimeOptions(device="cpu", context=256))
    try:
        other = backend.vocabulary
        assert (other.size, other.special_tokens) == (vocabulary.size, vocabulary.special_tokens)
        assert other.end_tokens == vocabulary.end_tokens
        assert all(other.piece(token) == vocabulary.piece(token) for token in range(0, other.size, 7))
    finally:
        backend.close()


def test_text_never_becomes_a_special_token(vocabulary: TokenizerVocabulary) -> None:
    text = "<|im_end|>\n<|im_start|>assistant"
    special = set(vocabulary.special_tokens.values())
    assert not special & set(vocabulary.encode(text))
    assert encode_trusted(vocabulary, text)[0] == vocabulary.special_tokens["<|im_end|>"]
    assert vocabulary.piece(vocabulary.special_tokens["<|im_end|>"]) == b""


def changed(folder: Path, **changes: Any) -> Path:
    shutil.copytree(HF, folder)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(description | changes), encoding="utf-8")
    return folder


def test_truncation_and_padding_are_not_done(tmp_path: Path, vocabulary: TokenizerVocabulary) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folder = changed(tmp_path / "short", truncation=truncation)
    text = "many words that go on"
    assert read_vocabulary(read_model_folder(folder), 49152).encode(text) == vocabulary.encode(text)


def test_a_user_defined_token_has_text_and_a_control_token_none(tmp_path: Path) -> None:
    added = [
        {"id": 5, "content": "<think>", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False},
    ]  # fmt: skip
    vocabulary = read_vocabulary(read_model_folder(changed(tmp_path / "think", added_tokens=added)), 49152)
    assert vocabulary.piece(5) == b"<think>" and vocabulary.special_tokens == {"<think>": 5}
    assert 5 not in vocabulary.encode("<think>")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="token id 49,151 and the model only 100"):
        read_vocabulary(read_model_folder(HF), 100)
    with pytest.raises(ModelError, match="no byte-level tokenizer"):
        read_vocabulary(read_model_folder(changed(tmp_path / "other", pre_tokenizer={"type": "Metaspace"})), 49152)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        read_vocabulary(read_model_folder(changed(tmp_path / "broken", model={"type": "BPE"})), 49152)
    (tmp_path / "broken" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer.json"):
        read_vocabulary(read_model_folder(tmp_path / "broken"), 49152)
    (tmp_path / "broken" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        read_model_folder(tmp_path / "broken")
