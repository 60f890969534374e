"""Labels: which response of a pair is known to be better, as data sets write it.

A word speaks for itself. What a number means depends on the others of its file, so `Labels` is shown all rows before
it reads one. Nothing is guessed: a label that is there and not understood is an error that names it.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from gramlite.errors import InputError
from gramlite.judging.pair import Winner

COLUMNS = ("label", "labels", "preference", "winner", "overall_preference", "chosen_position")
ONE_HOT_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")
MEANINGS: dict[str, Winner | None] = {"a": "A", "b": "B", "tie": "tie", "none": None}
NOUNS = ("response", "assistant", "model", "output", "answer")
WORDS: dict[str, Winner] = {
    **dict.fromkeys(("a", "first", "a>b", "a>>b", "b<a", "b<<a"), "A"),
    **dict.fromkeys(("b", "second", "b>a", "b>>a", "a<b", "a<<b"), "B"),
    **dict.fromkeys(("tie", "draw", "tiebothbad", "bothbad", "tieinconsistent", "a=b", "b=a", "[[c]]"), "tie"),
    **{noun + side: "A" for noun in NOUNS for side in ("a", "1")},
    **{noun + side: "B" for noun in NOUNS for side in ("b", "2")},
}
SIDES: tuple[Winner, ...] = ("A", "B", "tie")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
SPELLED = "A label is A, B or tie in a published spelling, as in Response A, [[A]], model_a, A>B or tie (bothbad)"


class LabelError(InputError):
    """A label that is there and not understood; the other errors of a row may leave it out, this one may not."""


class Labels:
    """What the labels of a file mean: `observe` each of its rows, then `read` them.

    `meanings` maps labels to what the user says they mean, as `parse_labels` gives it; None is no label. Of the numbers, a
    column's 1 and 2 are A and B where it holds both and no other; `preference` counts from 1 (A) to 2 (B), as
    AlpacaEval's does; all others mean only what they are given, and with one of them given no number means anything else.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]] = (), meanings: Mapping[str, Winner | None] | None = None
    ) -> None:
        self._meanings = meanings or {}
        self._numbers_explained = any(
            meaning and _number(label) is not None for label, meaning in self._meanings.items()
        )
        self._numbers: dict[str, set[float]] = {}
        for row in rows:
            self.observe(row)

    def observe(self, row: Mapping[str, Any]) -> None:
        """Take account of the number that a row may have for a label."""
        column, value = label_in(row)
        number = _number(value)
        if number is not None and _name(value) not in self._meanings:
            self._numbers.setdefault(column, set()).add(number)

    def read(self, row: Mapping[str, Any]) -> Winner | None:
        """A row's label, None where it has none; raises LabelError for one that is not understood."""
        column, value = label_in(row)
        if value is None or _name(value) in self._meanings:
            return None if value is None else self._meanings[_name(value)]
        number = _number(value)
        winner = self._counted(column, number) if number is not None else _spelled(column, value)
        if winner is None:
            where = "" if column == "label" else f" in {column}"
            raise LabelError(f"the label {shown(value)}{where} is not understood. {self._reason(column, number)}")
        return winner

    def _counted(self, column: str, number: float) -> Winner | None:
        numbers = self._numbers.get(column, set()) | {number}
        if self._numbers_explained or column == "overall_preference":
            return None
        if column == "preference" and all(1 <= each <= 2 for each in numbers):
            return "tie" if number == 1.5 else "A" if number < 1.5 else "B"
        return ("A" if number == 1 else "B") if numbers == {1, 2} else None

    def _reason(self, column: str, number: float | None) -> str:
        if number is None:
            return f'{SPELLED}; null or "" is none. Or say what it means, as in --labels yes=A,no=B,unsure=none.'
        if self._numbers_explained:
            return f"Say what it means: --labels says it of {', '.join(self._meanings)} only."
        found = ", ".join(map(_digits, sorted(self._numbers.get(column, ()))[:8]))
        return (
            f"{column} holds the numbers {found}; by themselves, only 1 and 2 are read, as A and B, where there are "
            "both and no other. Say what each means, as in --labels 0=A,1=B,2=tie."
        )


def label_of(row: Mapping[str, Any]) -> Winner | None:
    """The label of a row by itself, None where it has none; raises LabelError for one that is not understood."""
    return Labels([row]).read(row)


def label_from(value: object) -> Winner | None:
    """The label that a value is by itself, None for null and the empty text; raises LabelError for any other."""
    return label_of({"label": value})


def carried_label(row: Mapping[str, Any]) -> Winner | None:
    """The label of a row by itself, for those that have no use for it: None for one that is not understood, too."""
    try:
        return label_of(row)
    except LabelError:
        return None


def parse_labels(text: str) -> dict[str, Winner | None]:
    """What `0=A,1=B,2=tie` says; a label that is to count as none is `error=none`. Raises InputError."""
    meanings: dict[str, Winner | None] = {}
    for part in text.split(","):
        label, _, meaning = part.rpartition("=")
        name, meaning = _name(label.strip()), meaning.strip().casefold()
        if not name or meaning not in MEANINGS:
            raise InputError(f"--labels {text}: {part!r} should be LABEL=A, LABEL=B, LABEL=tie or LABEL=none.")
        if meanings.setdefault(name, MEANINGS[meaning]) != MEANINGS[meaning]:
            raise InputError(f"--labels {text} says two things of {label.strip()}.")
    return meanings


def label_in(row: Mapping[str, Any]) -> tuple[str, object]:
    """The column of a row's label and what stands there, None where there is none or an empty text."""
    for column in COLUMNS:
        if row.get(column) not in (None, ""):
            return column, row[column]
    votes = [row.get(column) for column in ONE_HOT_COLUMNS]
    if any(vote not in (None, "") for vote in votes):
        return ONE_HOT_COLUMNS[0], [vote or 0 for vote in votes]
    return COLUMNS[0], None


def shown(value: object) -> str:
    """A JSON value on one line, cut after 80 characters, control characters escaped."""
    if isinstance(value, list | dict):
        value = reprlib.repr(value)
        return value if value.isprintable() else ascii(value)
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if text.isprintable() else json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _number(value: object) -> float | None:
    """A number, also one written as text; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and NUMBER.fullmatch(value.strip())):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            return float("inf")
    return None


def _digits(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)


def _name(value: object) -> str:
    """What a label is known by in `--labels`: its digits, its word, true or false; empty for a list or an object."""
    if isinstance(value, bool):
        return str(value).lower()
    number = _number(value)
    if number is not None:
        return _digits(number)
    return _word(value) if isinstance(value, str) else ""


def _word(text: str) -> str:
    """A label's text without case, surrounding brackets and quotes, and what separates its parts."""
    word = text.strip().casefold()
    while len(word) > 1 and word != "[[c]]" and word[0] + word[-1] in ("[]", "()", '""', "''"):
        word = word[1:-1].strip()
    word = re.sub(r"\s*([<>=]+)\s*", r"\1", word)
    word = re.sub(r"(?<=\w)(?:\s+|[_-])(?=[\w(])", "", word)
    return re.sub(r"(?<=\w)\((\w+)\)$", r"\1", word)


def _spelled(column: str, value: object) -> Winner | None:
    """The side that a word names, or a one-hot list: of both sides, or of three columns."""
    if isinstance(value, str):
        return WORDS.get(_word(value))
    if isinstance(value, list) and len(value) == (3 if column in ONE_HOT_COLUMNS else 2):
        votes = [vote if isinstance(vote, bool) else _number(vote) for vote in value]
        return SIDES[votes.index(1)] if votes.count(1) == 1 and votes.count(0) == len(votes) - 1 else None
    return None
