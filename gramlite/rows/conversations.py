"""Conversations: what the sides share at the beginning is the question, what differs is each side's response, whole.

Messages have a `role` and a `content` (or `from` and `value`); a content is text, a list of text parts, or null beside
tool calls. Published data repeat a question in many ways, so that a `prompt` beside full conversations may be all of
what they share, a part of it, or what stands before it: `split` recognises each, and refuses where it cannot tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gramlite.errors import InputError

USERS = ("user", "human", "prompter")
SYSTEMS = ("system", "developer")
TEXT_PARTS = ("text", "input_text", "output_text", None)
ROLE_NAMES = {"gpt": "assistant"}  # ShareGPT's word for the role
MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of Anthropic's hh-rlhf


class Message(NamedTuple):
    """A message as a judge reads it: who speaks, and the text with its tool calls."""

    role: str
    text: str

    @property
    def is_users(self) -> bool:
        return self.role.lower() in USERS

    @property
    def is_reply(self) -> bool:
        """Whether a model or a tool speaks."""
        return self.role.lower() not in (*USERS, *SYSTEMS)

    def repeats(self, other: Message) -> bool:
        """Whether both say the same, whatever their users are called."""
        same_role = self.role.lower() == other.role.lower() or (self.is_users and other.is_users)
        return same_role and self.text.strip() == other.text.strip()


Messages = list[Message]


def parse_messages(value: object, name: str, role: str = "user") -> Messages:
    """A text (of `role`), a message or a list of them as messages; raises InputError that names the place."""
    if isinstance(value, str):
        return [Message(role, value)]
    given = [value] if isinstance(value, Mapping) else value
    if not isinstance(given, Sequence):
        raise InputError(f"{name} must be a string or a list of messages, not {type(value).__name__}.")
    if not given:
        raise InputError(f"{name} is an empty list of messages.")
    messages = [
        _parse_message(each, f"{name}[{index}]") for index, each in enumerate(given) if not _is_empty_system(each)
    ]
    if not messages:
        raise InputError(f"{name} is a list of messages that holds an empty system text alone.")
    return messages


def _is_empty_system(message: object) -> bool:
    """Whether this is the empty system text that some data have for none."""
    if not isinstance(message, Mapping) or _content_of(message):
        return False
    return bool(message.get("role", message.get("from")) == "system")


def _content_of(message: Mapping[str, Any]) -> object:
    content = message.get("content")
    return message.get("value") if content is None else content


def _parse_message(message: object, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{name} must be a message with a role and a content, not {type(message).__name__}.")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or not role.strip():
        raise InputError(f"{name} must be a message with a role (or from) and a content (or value).")
    text = _content_text(_content_of(message), name)
    called = message.get("tool_calls") or [call for call in [message.get("function_call")] if call]
    if not isinstance(called, Sequence) or isinstance(called, str):
        raise InputError(f"{name} has tool_calls that are no list.")
    if text is None and not called:
        raise InputError(f"{name} has no content.")
    lines = [_call_text(call, name) for call in called]
    return Message(ROLE_NAMES.get(role.lower(), role), "\n".join([text, *lines] if text else lines))


def _content_text(content: object, name: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InputError(f"{name} has a content of {type(content).__name__}; a judge reads text.")
    texts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, part)
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise InputError(f"{name} holds a part of type {kind or type(part).__name__!r}; a judge reads text.")
        texts.append(text)
    return "".join(texts)


def _call_text(call: object, name: str) -> str:
    """A tool call as its name and arguments."""
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{name} has a tool call without the name of a function.")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return f"{function['name']}({arguments})"


def messages_text(messages: Sequence[Message]) -> str:
    """Messages as one text: a single one is its text, several are headed by their roles."""
    if len(messages) == 1:
        return messages[0].text
    return "\n\n".join(f"{each.role.capitalize()}: {each.text}" for each in messages)


def conversation(messages: object, name: str = "messages") -> str:
    """A text or messages as the text of a question; raises InputError for what is no text."""
    return messages_text(parse_messages(messages, name))


def transcript(text: str) -> Messages | None:
    """The messages of a transcript as hh-rlhf has them, None of a text that is none."""
    text = text.lstrip("\n")
    if not text.startswith("Human:") or "\n\nAssistant:" not in text:
        return None
    _, *parts = MARK.split(text)
    return [Message(role, part.strip()) for role, part in zip(parts[::2], parts[1::2], strict=True)]


def messages_in(text: str) -> Messages | None:
    """The messages that lie in a column as JSON text, alone or under `messages`; None of any other text."""
    try:
        value: Any = json.loads(text) if text.lstrip()[:1] in ("[", "{") else None
        value = value.get("messages") if isinstance(value, dict) else value
        return parse_messages(value, "text") if value and isinstance(value, list) else None
    except (ValueError, RecursionError, InputError):
        return None


def split(before: Sequence[Messages], sides: Mapping[str, Messages]) -> tuple[str, list[str]]:
    """The question that `sides` share and the response of each, as texts.

    `before` holds what the row gives apart from the sides, in order: system text, earlier messages, the prompt. Each side
    may hold it already. Raises InputError, which names the side, where the question or a response cannot be told.
    """
    names, wholes, given = list(sides), list(sides.values()), [0] * len(sides)
    for name, whole in sides.items():
        _check_end(whole, name)
    for piece in reversed(before):
        for index, name in enumerate(names):
            wholes[index], given[index] = _joined(piece, wholes[index], given[index], name)
    shortest = min(wholes, key=len)
    shared = 0
    while shared < len(shortest) and all(whole[shared] == shortest[shared] for whole in wholes):
        shared += 1
    if shared == len(shortest):  # the sides are equal, or one ends where another goes on
        goes_on = next((name for name, whole in zip(names, wholes, strict=True) if len(whole) > shared), None)
        asked_again = any(each.is_users for whole in wholes for each in whole[shared:])
        if goes_on and (asked_again or not min(given)):
            ends = names[wholes.index(shortest)]
            raise InputError(f"{goes_on} goes on where {ends} ends: give both sides the same turns.")
        shared = min(given) or shared - 1
    question = shortest[:shared]
    asked = any(each.is_users for each in question)
    if not question or not (asked or all(each.is_reply for whole in wholes for each in whole[shared:])):
        raise InputError(f"{' and '.join(names[:2])} share no question: a prompt is needed, or the same turns in both.")
    return messages_text(question), [messages_text(whole[shared:]) for whole in wholes]


def _joined(piece: Messages, side: Messages, given: int, name: str) -> tuple[Messages, int]:
    """A side after `piece`, which it may hold already, and how many messages of it are given apart from the sides."""
    size = len(piece)
    held = [start for start in range(len(side) - size) if _repeat(piece, side[start : start + size])]
    if held and (not side[0].is_reply or (held[0] == 0 and any(each.is_users for each in piece))):
        return side, max(given, held[0] + size)
    if side[0].is_reply and not held:
        return piece + side, size + given
    overlap = next((n for n in range(min(size, len(side) - 1), 0, -1) if _repeat(piece[-n:], side[:n])), 0)
    follows = overlap or not (piece[-1].is_users or any(side[0].repeats(each) for each in piece))
    if held or not follows or (piece[-1].role.lower() in SYSTEMS and side[0].role.lower() in SYSTEMS):
        raise InputError(f"{name} opens a conversation that does not hold the {piece[-1].role}'s text beside it.")
    return piece + side[overlap:], max(given + size - overlap, size)


def _repeat(some: Messages, others: Messages) -> bool:
    return all(one.repeats(other) for one, other in zip(some, others, strict=True))


def _check_end(messages: Messages, name: str) -> None:
    if not messages[-1].is_reply:
        raise InputError(f"{name} ends with the {messages[-1].role.lower()}: there is no response to judge.")
