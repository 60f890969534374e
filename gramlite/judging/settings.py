"""What a verdict depends on besides the model and the template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gramlite.errors import InputError
from gramlite.generation.decoder import Mode

from .delimiters import Policy
from .pair import Order

THINK_SEQUENCES = 2  # both orders of a pair; more were no faster on two cores
FEW_SEQUENCES = 3  # with fewer running, votes that may not be needed are taken along
OPEN_PAIRS = 2  # that may want more votes: those of more do not stay computed, their prompts are read again
# votes share their prompt: eight an order were 1.1 times as fast in steps of 16 as of 10 (two cores, F16)
MOST_SEQUENCES = 16
SAMPLED_TEMPERATURE = 0.75  # what GRAM-R² is published with when it votes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a judge judges.

    `mode` "think" writes a rationale first, "direct" answers in one forward pass; `orders` "both" judges a pair as
    given and swapped; `votes` rationales are sampled for each order; `temperature` None means greedy for one vote and
    0.75 for several; `budget` is the most tokens a rationale may take; `delimiters` says what happens to section
    delimiters inside the text being judged. With `early_stop` votes that cannot change the verdict any more are not
    taken, with `confidence` neither are those that a sequential test at that level can do without.
    Raises InputError for a combination that makes no sense.
    """

    mode: Mode = "think"
    orders: Literal["both", "ab"] = "both"
    votes: int = 1
    temperature: float | None = None
    budget: int = 1024
    seed: int = 0
    delimiters: Policy = "neutralize"
    early_stop: bool = True
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.votes < 1 or self.budget < 1:
            raise InputError("--votes and --budget must be at least 1.")
        if self.temperature is not None and not 0 <= self.temperature <= 10:
            raise InputError("--temperature must lie between 0 and 10.")
        if self.votes > 1 and self.mode == "direct":
            raise InputError("--votes samples rationales, and direct mode writes none. Drop one of them.")
        if self.votes > 1 and self.temperature == 0:
            raise InputError("several votes at temperature 0 are all the same. Drop --votes or raise --temperature.")
        if self.confidence is not None and not (self.votes > 1 and self.early_stop and 0.5 <= self.confidence < 1):
            raise InputError(
                "--confidence lies between 0.5 and 1 and stops votes early: give --votes, not --all-votes."
            )

    @property
    def presented_orders(self) -> tuple[Order, ...]:
        return ("ab", "ba") if self.orders == "both" else ("ab",)

    @property
    def sequences(self) -> int:
        """How many generations to decode together where nobody says."""
        return 1 if self.mode == "direct" else min(MOST_SEQUENCES, THINK_SEQUENCES * self.votes)

    @property
    def sampled_at(self) -> float:
        """The temperature, with what `None` stands for; 0 is greedy."""
        if self.temperature is None:
            return SAMPLED_TEMPERATURE if self.votes > 1 else 0.0
        return self.temperature


def digest_without(record: Mapping[str, Any], *names: str) -> str:
    """Twelve hexadecimal digits of a `settings_record`, whatever these settings in it are."""
    kept = {key: value for key, value in record.items() if key not in names}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
