"""What a model's folder says of itself beside its weights: configuration, chat template, special and end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gramlite.errors import ModelError

MAX_JSON_BYTES = 256 << 20
SPECIAL = ("unk", "pad", "sep", "cls", "mask")  # tokens that chat templates may name beside bos and eos
MAX_COUNT = 1 << 31
# what llama.cpp takes for the end of a generation, by literal, whatever a model's files declare
END_LITERALS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<reponame>", "<|file_sep|>",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFolder:
    """A folder in the layout of Hugging Face; `ends` are the ids that its files declare to end a generation."""

    path: Path
    config: dict[str, Any]
    chat_template: str | None
    bos: str
    eos: str
    special: dict[str, str]
    ends: frozenset[int]

    @property
    def context(self) -> int:
        """The most tokens the model was trained for; raises ModelError where config.json does not say."""
        return min(self.count("max_position_embeddings"), attention_window(self.config) or MAX_COUNT)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive number of config.json; raises ModelError where it is missing or none."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < MAX_COUNT:
            raise ModelError(f"{self.path / 'config.json'} has {key} = {value!r}. Download the model again.")
        return value

    def describe(self, quantization: str | None) -> dict[str, Any]:
        """The metadata of a backend that runs this folder."""
        return {
            "quantization": quantization,
            "chat_template": self.chat_template,
            "template": None,  # the manifest's or the model card's, which both lie in the folder
            "bos": self.bos,
            "eos": self.eos,
            "special": self.special,
        }


def read_model_folder(path: Path) -> ModelFolder:
    """Read config.json, generation_config.json and the tokenizer's settings; raises ModelError for unusable ones."""
    config = read_json_object(path / "config.json")
    generation, settings = (
        read_json_object(path / name) if (path / name).is_file() else {}
        for name in ("generation_config.json", "tokenizer_config.json")
    )
    ends: set[int] = set()
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        ends |= {end for end in (value if isinstance(value, list) else [value]) if type(end) is int}
    return ModelFolder(
        path=path,
        config=config,
        chat_template=_chat_template(path, settings),
        bos=_literal(settings, "bos_token"),
        eos=_literal(settings, "eos_token"),
        special={f"{name}_token": _literal(settings, f"{name}_token") for name in SPECIAL},
        ends=frozenset(ends),
    )


def attention_window(config: Mapping[str, Any]) -> int | None:
    """How many tokens a Mistral's attention spans, None without a bound; the context ends there, up to which all agree.

    Beyond it llama.cpp would attend to all. transformers takes 4,096 where config.json says nothing.
    """
    value = config.get("sliding_window", 4096) if config.get("model_type") == "mistral" else None
    if value is not None and (type(value) is not int or not 0 < value < MAX_COUNT):
        raise ModelError(f"config.json's sliding_window is {value!r}; it must be a number or null. Download it again.")
    return value


def read_json_object(path: Path, *, advice: str = "Download it again.", finite: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object, with `finite` one without NaN and infinity.

    Raises ModelError, which names the file, otherwise.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no file. {advice}")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, more than such a file can be.")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse if finite else None)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}). {advice}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object. {advice}")
    return value


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a string that UTF-8 can hold, which not all are that JSON can."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that JSON knows")


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja goes before the entry of tokenizer_config.json, of which the one named default counts."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} cannot be read ({error}). Download it again.") from error
    stored = settings.get("chat_template")
    if isinstance(stored, list):
        stored = next(
            (each.get("template") for each in stored if isinstance(each, dict) and each.get("name") == "default"), None
        )
    if stored is not None and not is_text(stored):
        raise ModelError(f"{path / 'tokenizer_config.json'} has a chat_template that is no text. Download it again.")
    return stored


def _literal(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if is_text(value) else ""
