"""Conversations: lists of messages as the text of a question or of a response."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError


def completion_text(value: object, name: str) -> str:
    if isinstance(value, list):
        return messages_of(value, name)[-1]["content"]
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string or a list of messages, not {type(value).__name__}.")
    return value


def messages_of(value: list[Any], name: str) -> list[dict[str, str]]:
    for message in value:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("content"), str)
            and isinstance(message.get("role"), str)
        ):
            raise InputError(f"{name} must be a list of messages, each with a role and a content of text.")
    if not value:
        raise InputError(f"{name} is an empty list of messages.")
    return value


def conversation(messages: Iterable[Mapping[str, str]]) -> str:
    """Messages as the text of a question: one message is its content, several are headed by their roles."""
    turns = list(messages)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
