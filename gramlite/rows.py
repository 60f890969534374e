"""Input rows: JSON lines in the shapes that preference data comes in, read one at a time and checked.

A bad line never stops the others: it comes out as a row with an error that names its line number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Generic, TypeVar

from .errors import InputError
from .pair import FIELD_LIMIT_BYTES, Pair, Winner

LINE_LIMIT_BYTES = 8 * FIELD_LIMIT_BYTES
SHAPES = (
    "prompt + response_a + response_b; prompt + chosen + rejected (strings or message lists); "
    "question + response_A + response_B; instruction + output_1 + output_2"
)


@dataclass(frozen=True)
class Row:
    """A line of input: its number from 1, a digest of its bytes, and the pair on it or what is wrong with it."""

    line: int
    digest: str
    pair: Pair | None
    error: str | None = None


Value = TypeVar("Value")


@dataclass(frozen=True)
class Line(Generic[Value]):
    """A line of any input, as in Row, with what was made of it."""

    number: int
    digest: str
    value: Value | None
    error: str | None = None


def read_rows(stream: BinaryIO) -> Iterator[Row]:
    """Read the pairs of JSON lines; blank lines are skipped. Memory stays bounded whatever a line holds."""
    for line in read_lines(stream, pair_from_json):
        yield Row(line.number, line.digest, line.value, line.error)


def read_lines(stream: BinaryIO, build: Callable[[Mapping[str, Any], str], Value]) -> Iterator[Line[Value]]:
    """Read JSON lines and make something of each object with `build(object, default id)`; see `read_rows`."""
    for number, line in enumerate(_lines(stream), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        text = line.strip()
        if not text:
            continue
        digest = hashlib.sha256(text).hexdigest()[:16]
        try:
            if len(line) > LINE_LIMIT_BYTES:
                raise InputError(f"the line has more than {LINE_LIMIT_BYTES:,} bytes.")
            yield Line(number, digest, build(_parse(text), str(number)))
        except InputError as error:
            yield Line(number, digest, None, f"line {number}: {error}")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(LINE_LIMIT_BYTES + 1):
        yield line
        while len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):  # pass over the rest unread
            line = stream.readline(LINE_LIMIT_BYTES + 1)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"a JSON object is needed, not {type(value).__name__}.")
    return value


def pair_from_json(row: Mapping[str, Any], default_id: str | None = None) -> Pair:
    """The pair on a row of any accepted shape, checked; raises InputError that names the accepted shapes."""
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
    return pair


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
        prompt = conversation(_messages(prompt, "prompt"))
    elif not isinstance(prompt, str):
        raise InputError(f"prompt must be a string or a list of messages, not {type(prompt).__name__}.")
    completions = tuple(_completion(value, f"completions[{index}]") for index, value in enumerate(row["completions"]))
    return Item(prompt, completions, _identifier(row, default_id))


def _completion(value: object, name: str) -> str:
    if isinstance(value, list):
        return _messages(value, name)[-1]["content"]
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string or a list of messages, not {type(value).__name__}.")
    return value


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


Built = tuple[str, str, str, Winner | None]


def _plain(prompt: str, first: str, second: str) -> Callable[[Mapping[str, Any]], Built]:
    def build(row: Mapping[str, Any]) -> Built:
        question = _text(row, prompt)
        if prompt == "instruction" and isinstance(row.get("input"), str) and row["input"]:
            question = f"{question}\n\n{row['input']}"
        return question, _text(row, first), _text(row, second), label_from(row.get("label", row.get("preference")))

    return build


def _preference(row: Mapping[str, Any]) -> Built:
    """chosen and rejected, each a string or a list of messages that may repeat the prompt."""
    sides = {}
    history: list[Any] = []
    for side in ("chosen", "rejected"):
        value = row[side]
        if isinstance(value, list):
            *history, last = _messages(value, side)
            sides[side] = last["content"]
        else:
            sides[side] = _text(row, side)
    prompt = row.get("prompt", history)
    if isinstance(prompt, list):
        prompt = conversation(_messages(prompt, "prompt"))
    elif not isinstance(prompt, str):
        raise InputError(f"prompt must be a string or a list of messages, not {type(prompt).__name__}.")
    return prompt, sides["chosen"], sides["rejected"], "A"


def _messages(value: list[Any], name: str) -> list[dict[str, str]]:
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


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key} must be a string, not {type(value).__name__}.")
    return value


def label_from(value: object) -> Winner | None:
    """A label as benchmarks write it; anything unknown counts as unlabelled."""
    if isinstance(value, str):
        text = value.strip().upper().removeprefix("RESPONSE_").removeprefix("MODEL_")
        known: dict[str, Winner] = {
            "A": "A",
            "B": "B",
            "TIE": "tie",
            "A>B": "A",
            "B>A": "B",
            "A=B": "tie",
            "1": "A",
            "2": "B",
        }
        return known.get(text)
    if isinstance(value, int) and not isinstance(value, bool):
        numbers: dict[int, Winner] = {1: "A", 2: "B"}
        return numbers.get(value)
    return None


_BUILDERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Built]], ...] = (
    (("prompt", "response_a", "response_b"), _plain("prompt", "response_a", "response_b")),
    (("chosen", "rejected"), _preference),
    (("question", "response_A", "response_B"), _plain("question", "response_A", "response_B")),
    (("instruction", "output_1", "output_2"), _plain("instruction", "output_1", "output_2")),
    (("input", "output_1", "output_2"), _plain("input", "output_1", "output_2")),
)
