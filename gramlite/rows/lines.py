"""JSON lines, read one at a time: each comes out with its number, a digest of its bytes, and a value or an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from gramlite.errors import InputError
from gramlite.judging.pair import FIELD_LIMIT_BYTES, Identifier, Pair, Winner

from .labels import LabelError, Labels, carried_label
from .shapes import UnknownShapeError, identifier_of, pair_from_json

LINE_LIMIT_BYTES = 8 * FIELD_LIMIT_BYTES


class Readable(Protocol):
    """What lines are read from: a binary file, or whatever gives its lines one by one."""

    def readline(self, limit: int = ..., /) -> bytes: ...


Value = TypeVar("Value")


@dataclass(frozen=True)
class Row(Generic[Value]):
    """A line of input: its number from 1, a digest of its bytes, and what was made of it or what is wrong with it.

    `id` is the line's own, whatever is wrong with it, or its number as text; None where it does not parse. `strange`
    says that it is of no accepted shape or no object: perhaps the whole file is of another kind.
    """

    number: int
    digest: str
    value: Value | None
    error: str | None = None
    id: Identifier = None
    strange: bool = False


def read_rows(stream: Readable) -> Iterator[Row[Pair]]:
    """Read the pairs of JSON lines; blank lines are skipped. Memory stays bounded whatever a line holds.

    A label that needs its file to be understood, or isn't, is left out: see `read_labelled`.
    """
    return read_lines(stream, partial(pair_from_json, read_label=carried_label))


def read_labelled(stream: Readable, meanings: Mapping[str, Winner | None] | None = None) -> list[Row[Pair]]:
    """All rows with their labels, which are understood only together: see `Labels`, also for `meanings`.

    Raises LabelError that names the label and the line of a pair whose label is not understood.
    """
    labels = Labels(meanings=meanings)

    def noted(row: Mapping[str, Any], default_id: str) -> tuple[Mapping[str, Any], str]:
        labels.observe(row)
        return row, default_id

    rows = []
    for row in list(read_lines(stream, noted)):
        pair, problem = None, row.error
        try:
            pair = pair_from_json(*row.value, read_label=labels.read) if row.value else None
        except LabelError as error:
            raise LabelError(f"line {row.number}: {error}") from None
        except InputError as error:
            problem = f"line {row.number}: {error}"
        rows.append(Row(row.number, row.digest, pair, problem, row.id))
    return rows


def read_lines(stream: Readable, build: Callable[[Mapping[str, Any], str], Value]) -> Iterator[Row[Value]]:
    """Read JSON lines and make something of each object with `build(object, default id)`; see `read_rows`."""
    for number, line in enumerate(whole_lines(stream), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        text = line.strip()
        if not text:
            continue
        digest = hashlib.sha256(text).hexdigest()[:16]
        identifier: Identifier = None
        try:
            if len(line) > LINE_LIMIT_BYTES:
                raise InputError(f"the line has more than {LINE_LIMIT_BYTES:,} bytes.")
            value = _parse(text)
            identifier = str(number)
            if not isinstance(value, dict):
                raise InputError(f"a JSON object is needed, not {type(value).__name__}.")
            identifier = identifier_of(value, identifier)
            yield Row(number, digest, build(value, str(number)), None, identifier)
        except InputError as error:
            strange = isinstance(error, UnknownShapeError) or not text.startswith(b"{")
            yield Row(number, digest, None, f"line {number}: {error}", identifier, strange)


def whole_lines(stream: Readable) -> Iterator[bytes]:
    """The lines of a stream, of one that is too long only what tells so."""
    while line := stream.readline(LINE_LIMIT_BYTES + 1):
        yield line
        while len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):  # pass over the rest unread
            line = stream.readline(LINE_LIMIT_BYTES + 1)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}).") from None
