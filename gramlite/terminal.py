"""What a terminal is given: lines in which nothing that a file, a model or a data set holds can drive it.

A command's results go to standard output with `say` and `say_json`, everything else to standard error with `note`.
Tables and progress bars are in `console`; while a bar stands, notes go above it.
"""

from __future__ import annotations

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, half a character, line and paragraph ends
JOINERS = "\u200c\u200d"
FIRST_JOINED = "\u0600"  # the scripts and emoji that joiners belong to come after Latin, Greek and Cyrillic

bars: list[Console] = []  # of the progress bars that stand, the last one lowest


def visible(text: str, *, lines: bool = False) -> str:
    """Text with its control and format characters escaped as Python writes them: `\\x1b`, `\\u202e`, `\\n`.

    With `lines` the text is prose: its line ends, tabs and joiners stay. Else a joiner stays beside a letter, a mark or a
    symbol that may need it, as in Persian, Indic scripts and emoji.
    """
    if text.isprintable():
        return text

    def shown(place: int, character: str) -> bool:
        if character in JOINERS:
            return lines or any(map(_joins, text[max(place - 1, 0) : place + 2]))
        return lines and character in "\n\t"

    return _escaped(text, shown, lambda character: character.encode("unicode_escape").decode("ascii"))


def json_line(value: Any) -> str:
    """A value as JSON on one line, of the same characters as `visible` shows and the others escaped as JSON has it."""
    text = json.dumps(value, ensure_ascii=False)
    return (
        text if text.isprintable() else _escaped(text, lambda *_: False, lambda character: json.dumps(character)[1:-1])
    )


def say(*lines: str) -> None:
    """Print lines of a result for people to standard output."""
    for line in lines:
        click.echo(visible(line))


def say_json(value: Any) -> None:
    """Print a result for programs to standard output: JSON on one line, in UTF-8 whatever the locale."""
    click.echo(json_line(value).encode())


def note(*lines: str) -> None:
    """Print lines that are no result to standard error, above a progress bar where one stands; nobody has to listen."""
    for line in map(visible, lines):
        if bars:
            bars[-1].print(line, soft_wrap=True)
        else:
            with suppress(BrokenPipeError):
                click.echo(line, err=True)


def open_streams() -> None:
    """Prepare a command's standard streams: what a locale cannot show is escaped, and closed ones have a place.

    Closed standard input and output fail when they are used, and what is said to a closed standard error is lost. Else
    the next file that is opened would get their numbers, and what is printed.
    """
    for number, name, mode in ((0, "stdin", os.O_WRONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            os.open(os.devnull, mode)  # takes the lowest number that is free; the first two can't be used that way
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _joins(character: str) -> bool:
    return character >= FIRST_JOINED and unicodedata.category(character)[0] in "LMS"


def _escaped(text: str, shown: Callable[[int, str], bool], escape: Callable[[str], str]) -> str:
    return "".join(
        escape(character) if unicodedata.category(character) in HIDDEN and not shown(place, character) else character
        for place, character in enumerate(text)
    )
