"""The shapes of rows: what of an object is the prompt, the responses, the label, the id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..pair import Pair, Winner
from .conversations import completion_text, conversation, messages_of
from .labels import label_of

SHAPES = (
    "prompt + response_a + response_b; prompt + chosen + rejected (strings or message lists); "
    "question + response_A + response_B; instruction + output_1 + output_2"
)

Built = tuple[str, str, str, Winner | None]
ReadLabel = Callable[[Mapping[str, Any]], Winner | None]


def pair_from_json(
    row: Mapping[str, Any], default_id: str | None = None, *, read_label: ReadLabel = label_of
) -> Pair:
    """The pair on a row of any accepted shape, checked; raises InputError that names the accepted shapes.

    `read_label` reads the label of a row whose shape doesn't tell it, after all else.
    """
    for keys, build in _BUILDERS:
        if all(key in row for key in keys):
            prompt, response_a, response_b, label = build(row)
            break
    else:
        if "completions" in row:
            raise InputError("a row with completions is for `gramlite rank`.")
        found = ", ".join(sorted(map(str, row))[:8]) or "nothing"
        raise InputError(f"unknown shape (keys: {found}). Accepted: {SHAPES}.")
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise InputError("meta must be an object.")
    pair = Pair(prompt, response_a, response_b, id=_identifier(row, default_id), label=label, meta=meta)
    pair.check()
    return pair if label else replace(pair, label=read_label(row))


@dataclass(frozen=True)
class Item:
    """One question and the completions to rank."""

    prompt: str
    completions: tuple[str, ...]
    id: str | None = None


def item_from_json(row: Mapping[str, Any], default_id: str | None = None) -> Item:
    """The completions on a row: `prompt` and `completions`, texts or lists of messages; raises InputError."""
    if "prompt" not in row or not isinstance(row.get("completions"), list) or not row["completions"]:
        found = ", ".join(sorted(map(str, row))[:8]) or "nothing"
        raise InputError(f"unknown shape (keys: {found}). Accepted: prompt + completions, a list of at least one.")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = conversation(messages_of(prompt, "prompt"))
    elif not isinstance(prompt, str):
        raise InputError(f"prompt must be a string or a list of messages, not {type(prompt).__name__}.")
    completions = tuple(completion_text(value, f"completions[{index}]") for index, value in enumerate(row["completions"]))
    return Item(prompt, completions, _identifier(row, default_id))


def _identifier(row: Mapping[str, Any], default: str | None) -> str | None:
    for key in ("id", "pair_id"):
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(f"{key} must be a string or a whole number.")
        identifier = str(value)
        if len(identifier) > 1024 or not identifier.isprintable():
            raise InputError(f"{key} must be printable and at most 1,024 characters long.")
        return identifier
    return default


def _plain(prompt: str, first: str, second: str) -> Callable[[Mapping[str, Any]], Built]:
    def build(row: Mapping[str, Any]) -> Built:
        question = _text(row, prompt)
        if prompt == "instruction" and isinstance(row.get("input"), str) and row["input"]:
            question = f"{question}\n\n{row['input']}"
        return question, _text(row, first), _text(row, second), None

    return build


def _preference(row: Mapping[str, Any]) -> Built:
    """chosen and rejected, each a string or a list of messages that may repeat the prompt."""
    sides = {}
    history: list[Any] = []
    for side in ("chosen", "rejected"):
        value = row[side]
        if isinstance(value, list):
            *history, last = messages_of(value, side)
            sides[side] = last["content"]
        else:
            sides[side] = _text(row, side)
    prompt = row.get("prompt", history)
    if isinstance(prompt, list):
        prompt = conversation(messages_of(prompt, "prompt"))
    elif not isinstance(prompt, str):
        raise InputError(f"prompt must be a string or a list of messages, not {type(prompt).__name__}.")
    return prompt, sides["chosen"], sides["rejected"], "A"


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key} must be a string, not {type(value).__name__}.")
    return value


_BUILDERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Built]], ...] = (
    (("prompt", "response_a", "response_b"), _plain("prompt", "response_a", "response_b")),
    (("chosen", "rejected"), _preference),
    (("question", "response_A", "response_B"), _plain("question", "response_A", "response_B")),
    (("instruction", "output_1", "output_2"), _plain("instruction", "output_1", "output_2")),
    (("input", "output_1", "output_2"), _plain("input", "output_1", "output_2")),
)
