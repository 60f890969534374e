"""The input and the output of a judge: `Pair` in, `Verdict` out, and the JSON row that a verdict becomes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gramlite.errors import InputError

Winner = Literal["A", "B", "tie"]
Order = Literal["ab", "ba"]
Identifier = str | int | float | None  # as JSON has it: true and false are ints here

FIELD_LIMIT_BYTES = 1 << 20
TEXT_FIELDS = ("prompt", "response_a", "response_b")
_SECTION_HEAD = re.compile(r"^\W*(feedback|compari(?:so|sio)n|conclusion)\W*:[ \t*]*", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Pair:
    """One question and two responses to it.

    `label` is the known better response ("A", "B" or "tie") where there is one; it is carried, never shown to a judge.
    Text must be valid Unicode without NUL, at most 1 MiB a field in UTF-8; see `check`.
    """

    prompt: str
    response_a: str
    response_b: str
    id: Identifier = None
    label: Winner | None = None
    meta: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raise InputError unless every field is judgeable text."""
        for name in TEXT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InputError(f"{name} must be a string, not {type(value).__name__}.")
            try:
                size = len(value.encode("utf-8"))
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{name} holds a lone surrogate at character {error.start}; send valid Unicode."
                ) from None
            if size > FIELD_LIMIT_BYTES:
                raise InputError(f"{name} has {size:,} bytes; the limit is {FIELD_LIMIT_BYTES:,}. Shorten it.")
            if "\0" in value:
                raise InputError(f"{name} holds a NUL character at {value.index(chr(0))}; remove it.")
        if not self.response_a.strip() and not self.response_b.strip():
            raise InputError("both responses are empty: there is nothing to compare.")


@dataclass(frozen=True, kw_only=True)
class OrderVerdict:
    """What the judge said of a pair in one order of presentation, un-swapped.

    `p_a` is the probability that the pair's response_a is better, `margin` its log-odds in nats. With votes, `p_a` is
    the mean over the votes and `margin` its log-odds. A calibrated judge rescales both, but not the `votes`.
    `rationale` is the first vote's thinking, `sections` its parts. `prompt_ids` are the prompt's tokens, `generated_ids`
    all that the model was fed behind it in the first vote, and last the verdict's token; rows don't hold them.
    """

    order: Order
    verdict: Winner | None
    p_a: float | None
    margin: float | None
    rationale: str | None
    forced: bool
    votes: Mapping[str, int]
    tokens: Mapping[str, int]
    prompt_ids: tuple[int, ...] = field(default=(), repr=False, compare=False)
    generated_ids: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @property
    def sections(self) -> dict[str, str]:
        """The rationale's feedback, comparison and conclusion, as far as it has them."""
        return rationale_sections(self.rationale or "")

    def to_json(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "verdict": self.verdict,
            "p_a": self.p_a,
            "margin": self.margin,
            "rationale": self.rationale,
            "forced": self.forced,
            "votes": dict(self.votes),
            "tokens": dict(self.tokens),
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judged pair. `winner` is None where there is no verdict, and then `reason` says why.

    `p_a` is the mean of the orders' p_a, `margin` its log-odds in nats (positive favours response_a), `consistent`
    whether the orders agree (None with one order), `flags` what was noticed in the input.
    """

    id: Identifier
    winner: Winner | None = None
    p_a: float | None = None
    margin: float | None = None
    consistent: bool | None = None
    reason: str | None = None
    flags: tuple[str, ...] = ()
    orders: tuple[OrderVerdict, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""

    @property
    def rationale(self) -> str | None:
        """The thinking of the first order that agrees with the winner, or of the first order."""
        agreeing = [o.rationale for o in self.orders if o.verdict == self.winner and o.rationale]
        return agreeing[0] if agreeing else next((o.rationale for o in self.orders if o.rationale), None)

    @property
    def sections(self) -> dict[str, str]:
        """The feedback, comparison and conclusion of `rationale`, as far as it has them.

        Beware: in the order "ba" the judge calls the pair's response_b "Response A".
        """
        return rationale_sections(self.rationale or "")

    @property
    def feedback(self) -> str | None:
        return self.sections.get("feedback")

    @property
    def comparison(self) -> str | None:
        return self.sections.get("comparison")

    @property
    def conclusion(self) -> str | None:
        return self.sections.get("conclusion")

    def to_json(self) -> dict[str, Any]:
        """The judged row of the JSON contract."""
        return {
            "id": self.id,
            "verdict": self.winner,
            "p_a": self.p_a,
            "margin": self.margin,
            "consistent": self.consistent,
            "reason": self.reason,
            "flags": list(self.flags),
            "sections": self.sections or None,
            "orders": [order.to_json() for order in self.orders],
            "model": dict(self.model),
            "settings": self.settings,
        }


def rationale_sections(rationale: str) -> dict[str, str]:
    """A rationale's feedback, comparison and conclusion, as far as it has them.

    GRAM-R² was trained with the heading "Comparision"; both spellings are read, and both come out as `comparison`.
    """
    heads = list(_SECTION_HEAD.finditer(rationale))
    sections: dict[str, str] = {}
    ends = [*(head.start() for head in heads[1:]), len(rationale)]
    for head, end in zip(heads, ends, strict=False):
        name = head.group(1).lower()
        body = rationale[head.end() : end].strip()
        sections.setdefault("comparison" if name.startswith("compar") else name, body)
    return sections
