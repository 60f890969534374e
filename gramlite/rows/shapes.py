"""The shapes of rows: what of an object is the prompt, the responses, the label, the id."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gramlite.errors import InputError
from gramlite.judging.pair import Identifier, Pair, Winner

from .conversations import Message, Messages, messages_in, messages_text, parse_messages, split, transcript
from .labels import label_of

SHAPES = (
    "prompt + response_a + response_b; prompt + chosen + rejected (strings or message lists, which may hold the "
    "prompt); question + response_A + response_B; instruction + output_1 + output_2 (an input may stand beside the "
    "instruction); context + response1 + response2; conversation_a + conversation_b; conversations + chosen + "
    "rejected; messages + rejected_response or rejected_messages. A system text may stand beside each"
)
ITEM_SHAPE = "prompt + completions, a list of at least one"

PLAIN = ("response_a", "response_b")
COMPLETIONS = ("completions",)
RESPONSES = (  # the columns of two responses as they are published, the native ones first
    PLAIN,
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_A", "response_B"),
    ("output_1", "output_2"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response 1", "response 2"),
    ("human_ref_A", "human_ref_B"),
    ("conversation_a", "conversation_b"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
)
BETTER_FIRST = ("chosen", "chosen_response", "messages")
QUESTIONS = ("prompt", "question", "instruction", "input")
EARLIER = ("messages", "conversations", "context", "history")
IDENTIFIER_LIMIT = 1024

ReadLabel = Callable[[Mapping[str, Any]], Winner | None]


class UnknownShapeError(InputError):
    """A row of none of the accepted shapes: perhaps the file is of another kind."""


def pair_from_json(row: Mapping[str, Any], default_id: str | None = None, *, read_label: ReadLabel = label_of) -> Pair:
    """The pair on a row of any accepted shape, checked; raises InputError that names the accepted shapes.

    `read_label` reads the label of a row whose shape doesn't tell it, after all else.
    """
    identifier = identifier_of(row, default_id)
    columns = response_columns(row)
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise InputError("meta must be an object.")
    prompt, (response_a, response_b) = _texts(row, columns)
    label: Winner | None = "A" if columns[0] in BETTER_FIRST else None
    pair = Pair(prompt, response_a, response_b, id=identifier, label=label, meta=meta)
    pair.check()
    return pair if label else replace(pair, label=read_label(row))


@dataclass(frozen=True)
class Item:
    """One question and the completions to rank."""

    prompt: str
    completions: tuple[str, ...]
    id: Identifier = None


def item_from_json(row: Mapping[str, Any], default_id: str | None = None) -> Item:
    """The completions on a row: `prompt` and `completions`, texts or lists of messages; raises InputError."""
    identifier = identifier_of(row, default_id)
    completions = row.get("completions")
    if "prompt" not in row or not isinstance(completions, list) or not completions:
        raise UnknownShapeError(f"unknown shape (keys: {_keys(row)}). Accepted: {ITEM_SHAPE}.")
    names = [f"completions[{index}]" for index in range(len(completions))]
    sides = {name: parse_messages(value, name, "assistant") for name, value in zip(names, completions, strict=True)}
    before = _before(row, COMPLETIONS, plain=all(isinstance(value, str) for value in completions))
    prompt, responses = split(before, sides)
    return Item(prompt, tuple(responses), identifier)


def identifier_of(row: Mapping[str, Any], default: str | None) -> Identifier:
    """A row's `id` or `pair_id` as it is, else the default; raises InputError for one that cannot be given back."""
    for key in ("id", "pair_id"):
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str | int | float):
            raise InputError(f"{key} must be a string or a number, not {type(value).__name__}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} must be a number that JSON can hold, not {value}.")
        if len(identifier_text(value)) > IDENTIFIER_LIMIT:
            raise InputError(f"{key} must be at most {IDENTIFIER_LIMIT:,} characters long.")
        return value
    return default


def identifier_text(identifier: Identifier) -> str:
    """An id as text: a string is itself, anything else as JSON writes it, so that 1, 1.0 and true differ."""
    return identifier if isinstance(identifier, str) else json.dumps(identifier)


def puts_better_first(row: Mapping[str, Any]) -> bool:
    """Whether a row's columns say which response is better, which then comes first."""
    return response_columns(row)[0] in BETTER_FIRST


def response_columns(row: Mapping[str, Any]) -> tuple[str, str]:
    """The columns that hold a row's responses; raises InputError where there are none, or several of them."""
    present = [columns for columns in RESPONSES if all(name in row for name in columns)]
    found = [columns for columns in present if all(row[name] is not None for name in columns)] or present
    if PLAIN in present:
        return PLAIN
    if len(found) > 1:  # `messages` beside two responses are what comes before them, or a copy of one
        found = [columns for columns in found if columns[0] != "messages"] or found
    if not found:
        if "completions" in row:
            raise UnknownShapeError("a row with completions is for `gramlite rank`.")
        raise UnknownShapeError(f"unknown shape (keys: {_keys(row)}). Accepted: {SHAPES}.")
    if len(found) > 1:
        named = " and ".join(" + ".join(columns) for columns in found)
        raise InputError(f"the row holds both {named}. Keep one of them.")
    return found[0]


def is_table_head(names: Iterable[str]) -> bool:
    """Whether columns of these names make rows of an accepted shape."""
    known = set(names)
    pairs = (known >= {*columns} and known & {*QUESTIONS, *EARLIER, *BETTER_FIRST} for columns in RESPONSES)
    return any(pairs) or known >= {"prompt", "completions"}


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:8]) or "nothing"


def _texts(row: Mapping[str, Any], columns: tuple[str, str]) -> tuple[str, list[str]]:
    """The prompt and the two responses on a row."""
    values = [_single(row, name) for name in columns]
    before = _before(row, columns, plain=all(isinstance(value, str) for value in values))
    sides = [parse_messages(value, name, "assistant") for name, value in zip(columns, values, strict=True)]
    if columns == ("messages", "rejected_response"):
        last = max((index for index, turn in enumerate(sides[0]) if turn.is_users), default=-1)
        before += [sides[0][: last + 1]] if last >= 0 else []
        sides[0] = sides[0][last + 1 :] or sides[0]  # none after the user's last turn: refused as what it ends with
    elif columns != PLAIN and all(isinstance(value, str) for value in values):
        sides = _written(values, before) or sides
    if not before and all(isinstance(value, str) and len(side) == 1 for value, side in zip(values, sides, strict=True)):
        raise UnknownShapeError(f"there is no prompt (keys: {_keys(row)}). Accepted: {SHAPES}.")
    return split(before, dict(zip(columns, sides, strict=True)))


def _single(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column of responses; of a list of texts, which some columns hold, the only one."""
    value = row[name]
    if name in PLAIN or not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        return value
    if len(value) > 1:
        raise InputError(
            f"{name} holds {len(value)} responses, and a pair has one. Make a row of each, or rank them: "
            "prompt + completions with `gramlite rank`."
        )
    return value[0]


def _written(texts: list[str], before: list[Messages]) -> list[Messages] | None:
    """Texts that are conversations written out, unless there is a prompt apart from them that they do not hold."""
    prompt = before[-1][0] if before and len(before[-1]) == 1 and before[-1][0].is_users else None
    for read in (transcript, messages_in):
        sides = [turns for text in texts if (turns := read(text))]
        own = prompt and read(prompt.text)
        if len(sides) < len(texts):
            continue
        if own:  # a transcript's last mark, with nothing after it, opens the response
            before[-1] = own[:-1] if own[-1].is_reply and not own[-1].text else own
        elif prompt and not all(any(turn.repeats(prompt) for turn in side) for side in sides):
            continue
        return sides
    return None


def _before(row: Mapping[str, Any], columns: tuple[str, ...], *, plain: bool) -> list[Messages]:
    """What a row gives apart from its responses (which may be `plain` texts): system text, earlier turns, prompt."""
    before = [parse_messages(row["system"], "system", "system")] if row.get("system") else []
    question = _question(row, columns, plain)
    for name in EARLIER:
        value = row.get(name)
        if not value or name in columns or (question and columns == PLAIN):
            continue
        if isinstance(value, list) and all(isinstance(entry, list) for entry in value):
            before.append(_exchanges(value, name))
        elif isinstance(value, list) and isinstance(value[0], Mapping):
            if not any(value == row[column] for column in columns):  # a copy of a side says nothing new
                before.append(parse_messages(value, name))
        elif question is None:
            question = parse_messages(value, name)
    return before if question is None else [*before, question]


def _exchanges(value: list[list[Any]], name: str) -> Messages:
    """Earlier turns as pairs of a question and an answer."""
    if not all(len(entry) == 2 and all(isinstance(text, str) for text in entry) for entry in value):
        raise InputError(f"{name} must be a list of messages, or of a question and an answer each.")
    return [Message(role, text) for entry in value for role, text in zip(("user", "assistant"), entry, strict=True)]


def _question(row: Mapping[str, Any], columns: tuple[str, ...], plain: bool) -> Messages | None:
    """The prompt on a row; None where there is none, or an empty one beside conversations. Refuses two that differ."""
    given = [name for name in QUESTIONS if row.get(name)]
    if not given:
        empty = plain and any(row.get(name) == "" for name in QUESTIONS)
        return [Message("user", "")] if empty else None
    if given[0] == "prompt" and columns in (PLAIN, COMPLETIONS):
        return parse_messages(row["prompt"], "prompt")
    if given == ["instruction", "input"]:
        return [Message("user", "\n\n".join(messages_text(parse_messages(row[name], name)) for name in given))]
    first, *others = (parse_messages(row[name], name) for name in given)
    if any(other != first for other in others):
        raise InputError(f"the row holds {' and '.join(given)}, which differ. Keep the one that was asked.")
    return first
