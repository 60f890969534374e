"""Finds a template's section delimiters inside untrusted text, in any case, width or spacing, and defuses them.

Text being judged may try to close its own section or to forge an answer. Text and delimiters are compared after NFKC
and case folding (Unicode Standard Annex 15), with white space and invisible characters left out and a few look-alike
brackets, quotes and slashes folded together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Policy = Literal["neutralize", "flag", "reject"]

LOOK_ALIKES = {
    "[": "【〖〔⟦❲⁅⦋⦗〘〚",
    "]": "】〗〕⟧❳⁆⦌⦘〙〛",
    "<": "‹〈⟨❮❰˂≺",
    ">": "›〉⟩❯❱˃≻",
    "'": "’‘ʼʹ′`´ꞌ",
    "/": "⁄∕⧸╱",
    "#": "♯",
}


class _Folding(dict[int, str]):
    """A translation table that fills itself: code point → folded text, empty for what is left out."""

    def __missing__(self, code: int) -> str:
        folded = "".join(
            character
            for character in unicodedata.normalize("NFKC", chr(code)).casefold()
            if not character.isspace() and unicodedata.category(character) not in ("Cf", "Cc", "Mn", "Me")
        )
        self[code] = folded
        return folded


_FOLDING = _Folding({ord(alike): plain for plain, alikes in LOOK_ALIKES.items() for alike in alikes})


@dataclass(frozen=True)
class Hit:
    """A delimiter found in text: `text[start:end]` reads as `delimiter`."""

    start: int
    end: int
    delimiter: str


def fold(text: str) -> str:
    """The text as delimiters are compared: NFKC, case folded, without white space and invisible characters."""
    return text.translate(_FOLDING)


def find_delimiters(text: str, delimiters: Iterable[str]) -> list[Hit]:
    """Every place where `text` reads as one of the delimiters, in order, none overlapping an earlier one."""
    folded = fold(text)
    wanted = [(fold(delimiter), delimiter) for delimiter in delimiters]
    if not any(needle in folded for needle, _ in wanted):
        return []
    origin = [index for index, character in enumerate(text) for _ in _FOLDING[ord(character)]]
    found = []
    for needle, delimiter in wanted:
        at = folded.find(needle)
        while at >= 0:
            found.append(Hit(origin[at], origin[at + len(needle) - 1] + 1, delimiter))
            at = folded.find(needle, at + 1)
    found.sort(key=lambda hit: (hit.start, -hit.end))
    apart: list[Hit] = []
    for hit in found:
        if not apart or hit.start >= apart[-1].end:
            apart.append(hit)
    return apart


def neutralize(text: str, hits: Iterable[Hit]) -> str:
    """Put each hit in round brackets in place of its own, which a person reads alike and no template uses."""
    parts = []
    done = 0
    for hit in hits:
        parts += [text[done : hit.start], "(", text[hit.start + 1 : hit.end - 1], ")"]
        done = hit.end
    return "".join([*parts, text[done:]])
