"""Finds a template's section delimiters inside untrusted text, however they are dressed up, and defuses them.

Text being judged may try to close its own section or to forge an answer. Text and delimiters are compared character
by character after compatibility decomposition and case folding (Unicode Standard Annex 15), with the look-alikes of
Unicode's table of confusables (Technical Standard 39) read as the ASCII character that they resemble, brackets of any
style as plain ones, and without white space, marks and what cannot be seen. Tag characters (U+E0020 to U+E007E) are
both left out and read as the ASCII that they stand for. A tag counts with attributes, too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Literal, NamedTuple

Policy = Literal["neutralize", "flag", "reject"]

INVISIBLE = ("Cf", "Cc", "Mn", "Me")
BLANK = (
    "\u115f\u1160\u2065\u2800\U0001d159"  # Hangul fillers, the braille blank, the null notehead: letters without ink
)
ALIKE = {"`": "'", "1": "i", "l": "i", "0": "o", "≺": "<", "≻": ">", "♯": "#"}  # beside the table
BRACKETS = {"PARENTHES": "()", "CURLY": "{}", "DOUBLE ANGLE": "", "ANGLE": "<>", "BRACKET": "[]"}  # by Unicode's names
SIDES = {"Ps": 0, "Pi": 0, "Pe": 1, "Pf": 1}
LATIN = re.compile(r"(?:LATIN (?:SMALL|CAPITAL) LETTER|LATIN LETTER SMALL CAPITAL|INDICATOR SYMBOL LETTER) ([A-Z])\b")
SHADOWS = {code: chr(code - 0xE0000) for code in range(0xE0020, 0xE007F)}

TAG = re.compile(r"<(/?)([\w-]+)>")
VALUE = r"""(?:"[^"]{0,256}+"|'[^']{0,256}+'|[^ "'<>=()\[\]]{1,256}+)"""
ATTRIBUTES = rf"(?:[ /]++[\w:@“][\w:.”-]{{0,63}}+(?: *+= *+{VALUE})?+)*+[ /]*+>"  # as HTML writes them

# Tokens by which other families' models mark turns and ends; a name between bars may be any with an underscore in it.
NAMES = (
    "assistant bot call channel chatbot constrain context end endofprompt endofsystem endofturn endoftext eom eos eot human "
    "message observation pad python return start sep system tool user"
)
BARRED = r"<\|/?(?:{names}|[^\W\d_]{{2,32}}(?:[_▁][^\W_]{{1,32}}){{1,6}})\|>|\[\|/?(?:{names})\|\]"
UPPER = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<BOS_TOKEN>", "<EOS_TOKEN>",
         "<EOP_TOKEN>")  # fmt: skip
OTHERS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "</s>")


class Hit(NamedTuple):
    """A delimiter found in text: `text[start:end]` reads as `delimiter`."""

    start: int
    end: int
    delimiter: str


class _Folding(dict[int, str]):
    """A translation table that fills itself: code point → folded text, a space for white space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        plain = unicodedata.normalize("NFKD", character)
        if plain != character and not character.isspace() and (plain[0] == " " or not plain.isascii()):
            plain = prototypes().get(character, plain)  # an accent that stands alone is a quote and no white space
        self[code] = "".join(map(_fold_one, plain))
        return self[code]


_FOLDING = _Folding()


def _fold_one(character: str) -> str:
    """A character that has no decomposition, as it is compared."""
    if character.isspace():
        return " "
    code = ord(character)
    if unicodedata.category(character) in INVISIBLE or character in BLANK or 0xE0000 <= code < 0xE1000:
        return ""
    if not character.isascii():
        character = _ascii_alike(character)
    return "".join(ALIKE.get(each, each) for each in character.casefold())


def _ascii_alike(character: str) -> str:
    """The ASCII character that another one looks like, or itself."""
    name = unicodedata.name(character, "")
    if (side := SIDES.get(unicodedata.category(character))) is not None:
        style = next((style for style in BRACKETS if style in name), None)
        if style:
            return BRACKETS[style][side : side + 1] or character
    alike = prototypes().get(character) or prototypes().get(character.upper())
    if alike == "l" and not character.isalnum():
        return "|"  # which the table takes for one with l
    letter = LATIN.search(name)
    return alike or (letter[1] if letter else character)


@cache
def prototypes() -> dict[str, str]:
    """Each character that Unicode's table says may be confused with a single ASCII character → that character."""
    from confusable_homoglyphs.confusables import confusables_data

    found: dict[str, str] = {}
    for target, entries in confusables_data.items():
        plain = _without_marks(unicodedata.normalize("NFKD", target))
        if len(plain) == 1 and plain.isascii():
            alikes = (_without_marks(entry["c"]) for entry in entries)
            found |= {alike: plain for alike in alikes if len(alike) == 1 and not alike.isascii()}
    return found


def _without_marks(text: str) -> str:
    return "".join(character for character in text if unicodedata.category(character) not in INVISIBLE)


def fold(text: str) -> str:
    """The text as delimiters are compared, without white space and invisible characters."""
    return text.translate(_FOLDING).replace(" ", "")


def find_delimiters(text: str, delimiters: Iterable[str]) -> list[Hit]:
    """Every place where `text` reads as one of the delimiters, in order; places may overlap."""
    wanted = tuple(delimiters)
    found = {hit for reading in _readings(text) for hit in _find(reading, wanted)}
    return sorted(found, key=lambda hit: (hit.start, -hit.end, hit.delimiter))


def _readings(text: str) -> set[str]:
    """The text, and with tag characters read as ASCII, of the same length."""
    return {text, text.translate(SHADOWS)}


def _find(text: str, delimiters: tuple[str, ...]) -> Iterable[Hit]:
    spaced = text.translate(_FOLDING)
    folded = spaced.replace(" ", "")
    needles, tags = _patterns(delimiters)
    needles = {needle: delimiter for needle, delimiter in needles.items() if needle in folded}
    spans = [(match.span(1), tag) for pattern, tag in tags for match in pattern.finditer(spaced)]
    places = _places(text) if spans or needles else []
    for (start, end), tag in spans:
        yield Hit(places[start], places[end - 1] + 1, tag)
    if len(folded) < len(spaced):
        places = [place for place, character in zip(places, spaced, strict=False) if character != " "]
    for needle, delimiter in needles.items():
        at = folded.find(needle)
        while at >= 0:
            yield Hit(places[at], places[at + len(needle) - 1] + 1, delimiter)
            at = folded.find(needle, at + 1)


def _places(text: str) -> list[int]:
    """Where each character of the folded text, white space included, comes from."""
    return [index for index, character in enumerate(text) for _ in _FOLDING[ord(character)]]


@lru_cache(maxsize=16)
def _patterns(delimiters: tuple[str, ...]) -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    """Each delimiter by what it reads as, folded, and what the tags among them read as with attributes."""
    tags = []
    for delimiter in delimiters:
        if match := TAG.fullmatch(delimiter):
            slash, name = (" */ *" if match[1] else ""), re.escape(fold(match[2]))
            tags.append((re.compile(f"(?=(<{slash}{name}{ATTRIBUTES}))"), delimiter))
    return {needle: delimiter for delimiter in delimiters if (needle := fold(delimiter))}, tags


def neutralize(text: str, hits: Iterable[Hit]) -> str:
    """Put each hit in round brackets in place of its own, which a person reads alike and no template uses."""
    characters = list(text)
    for hit in hits:
        characters[hit.start], characters[hit.end - 1] = "()"
    return "".join(characters)


def find_special_tokens(text: str) -> list[str]:
    """The special tokens of any family of models that stand in a text, each once, as it is written there."""
    found: dict[str, None] = {}
    for reading in _readings(text):
        spaced = reading.translate(_FOLDING)
        places: list[int] = []
        for match in _special_pattern().finditer(spaced):
            places = places or _places(reading)
            written = reading[places[match.start()] : places[match.end() - 1] + 1]
            if match["upper"] is None or written == written.upper():
                found[written if len(written) == len(match[0]) else match[0]] = None
    return list(found)


@cache
def _special_pattern() -> re.Pattern[str]:
    upper, others = ("|".join(re.escape(fold(token)) for token in tokens) for tokens in (UPPER, OTHERS))
    return re.compile(f"(?P<upper>{upper})|{others}|{BARRED.format(names='|'.join(map(fold, NAMES.split())))}")
