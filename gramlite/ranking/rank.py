"""Ranking completions of one question with a pairwise judge: the best, an order, or scores from all pairs.

Comparisons are judged in both orders as the judge's settings say, laid out so that neighbours share the longest
beginnings: all prompts of a question, and among them all that show the same completion first, follow each other.
Completions that are equal count as one, and a comparison that is known is not made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from gramlite.errors import InputError
from gramlite.generation.decoder import softmax_first
from gramlite.judging.conclusion import conclude
from gramlite.judging.judge import Judge
from gramlite.judging.logistic import Floats
from gramlite.judging.pair import Identifier, Pair, Verdict, Winner

from .bradley_terry import MOST_CYCLES, bradley_terry, cycles
from .plans import Batch, Method, plan_for

METHODS: tuple[Method, ...] = ("best", "tournament", "full")
DECIMALS = 6
_RESPONSE = re.compile(r"\bresponse_([ab])\b")
OTHER: Mapping[Winner | None, Winner | None] = {"A": "B", "B": "A", "tie": "tie", None: None}


@dataclass(frozen=True)
class Comparison:
    """Two completions, by index, and the verdict on them; its response_a is `first`. `known` says it was not made anew."""

    first: int
    second: int
    verdict: Verdict
    known: bool = False

    @property
    def winner(self) -> int | None:
        """The index of the better one; None for a tie or no verdict."""
        return {"A": self.first, "B": self.second}.get(self.verdict.winner or "")

    def to_json(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "pair": [self.first, self.second], "winner": self.winner, "p_first": verdict.p_a, "margin": verdict.margin,
            "consistent": verdict.consistent, "reason": verdict.reason, "rationale": verdict.rationale,
            "known": self.known,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Completions in order. Indices count from 0 in the order given.

    `ranking` holds them from best to worst, None where a missing verdict leaves it open, and then `reason` says which.
    `scores` and `standard_errors` are Bradley-Terry, in nats with mean zero, by index; None where the method does not
    give them. `cycles` are circles of preference: (0, 2, 5) means 0 beats 2, 2 beats 5 and 5 beats 0.
    """

    id: Identifier
    method: Method
    ranking: tuple[int, ...] | None
    scores: tuple[float, ...] | None = None
    standard_errors: tuple[float, ...] | None = None
    comparisons: tuple[Comparison, ...] = ()
    cycles: tuple[tuple[int, ...], ...] = ()
    flags: tuple[str, ...] = ()
    reason: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: str = ""

    @property
    def best(self) -> int | None:
        return self.ranking[0] if self.ranking else None

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of all prompts, those that were not computed again, and those generated."""
        orders = [order for made in self.comparisons if not made.known for order in made.verdict.orders]
        return {name: sum(order.tokens[name] for order in orders) for name in ("prompt", "cached", "generated")}

    def to_json(self) -> dict[str, Any]:
        """The ranked row of the JSON contract; `verdict` is the index of the best, None where there is none."""
        return {
            "id": self.id, "method": self.method, "verdict": self.best, "ranking": self.ranking,
            "scores": self.scores, "standard_errors": self.standard_errors, "reason": self.reason,
            "cycles": [list(cycle) for cycle in self.cycles], "flags": list(self.flags), "tokens": self.tokens,
            "comparisons": [made.to_json() for made in self.comparisons], "model": dict(self.model),
            "settings": self.settings,
        }  # fmt: skip


class KnownComparisons:
    """Verdicts by what was asked of whom, so that no comparison is made twice; the oldest are forgotten."""

    def __init__(self, limit: int = 10_000) -> None:
        self._limit = limit
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()

    def find(self, judge: Judge, prompt: str, first: str, second: str) -> Verdict | None:
        """The verdict on a pair, also where it was asked the other way round and both orders were judged."""
        found = self._verdicts.get(_question(judge, prompt, first, second))
        if found is None and judge.settings.orders == "both":
            swapped = self._verdicts.get(_question(judge, prompt, second, first))
            found = swapped and swap(swapped)
        return found

    def add(self, judge: Judge, prompt: str, first: str, second: str, verdict: Verdict) -> None:
        self._verdicts[_question(judge, prompt, first, second)] = verdict
        while len(self._verdicts) > self._limit:
            self._verdicts.popitem(last=False)


def _question(judge: Judge, *texts: str) -> str:
    model = [judge.model.get(key) for key in ("sha256", "adapter", "quantization")]
    record = [*model, judge.settings_hash, *texts]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def rank(
    judge: Judge,
    *,
    prompt: str,
    completions: Sequence[str],
    method: Method = "best",
    id: Identifier = None,
    known: KnownComparisons | None = None,
) -> Ranking:
    """Rank the completions of one prompt.

    "best" finds the best one in n - 1 comparisons; "tournament" sorts them, or from 33 on plays swiss rounds;
    "full" compares all pairs. `known` remembers comparisons from call to call. Raises InputError for an unknown
    method or for no completions.
    """
    if method not in METHODS:
        raise InputError(f"There is no ranking method {method!r}. Choose one of {', '.join(METHODS)}.")
    if isinstance(completions, str) or not completions or not all(isinstance(text, str) for text in completions):
        raise InputError("Ranking needs a list of completions, each a string.")
    contest = _Contest(judge, prompt, completions, known if known is not None else KnownComparisons())
    plan = plan_for(method, len(contest.texts))
    try:
        batch = next(plan)
        while True:
            margins = contest.play(batch)
            if None in margins and method != "full":  # nobody advances without a verdict
                return contest.result(id, method, None, broken=True)
            batch = plan.send([margin or 0.0 for margin in margins])
    except StopIteration as end:
        return contest.result(id, method, end.value)


class _Contest:
    """One question's distinct completions and what was found out about them."""

    def __init__(self, judge: Judge, prompt: str, completions: Sequence[str], known: KnownComparisons) -> None:
        self._judge = judge
        self._prompt = prompt
        self._known = known
        places: dict[str, list[int]] = {}
        for index, text in enumerate(completions):
            places.setdefault(text if text.strip() else "", []).append(index)
        self.texts = list(places)
        self._places = list(places.values())
        self._played: list[Comparison] = []  # by the numbers of the distinct texts

    def play(self, batch: Batch) -> list[float | None]:
        """Compare the pairs of a batch; their margins, None where there is no verdict."""
        asked = [(self.texts[first], self.texts[second]) for first, second in batch]
        verdicts = [self._known.find(self._judge, self._prompt, *texts) for texts in asked]
        missing = [number for number, verdict in enumerate(verdicts) if verdict is None]
        made = compare(self._judge, self._prompt, self.texts, [batch[number] for number in missing])
        fresh = dict(zip(missing, made, strict=True))
        margins = []
        for number, (pair, verdict) in enumerate(zip(batch, verdicts, strict=True)):
            verdict = verdict or fresh[number]
            self._played.append(Comparison(*pair, verdict, known=number not in fresh))
            margins.append(verdict.margin if verdict.winner else None)
            if number in fresh and verdict.winner:
                self._known.add(self._judge, self._prompt, *asked[number], verdict)
        return margins

    def result(self, id: Identifier, method: Method, order: list[int] | None, *, broken: bool = False) -> Ranking:
        """The ranking in terms of all completions; without an `order`, by the scores of what was played."""
        undecided = [played for played in self._played if played.verdict.winner is None]
        games = [
            (played.first, played.second, softmax_first(played.verdict.margin or 0.0))
            for played in self._played
            if played.verdict.winner is not None
        ]
        reason = scores = errors = None
        if undecided and (broken or not _connected(len(self.texts), games)):
            first, second = (self._places[number][0] for number in (undecided[0].first, undecided[0].second))
            reason = f"completions {first} and {second} have no verdict: {undecided[0].verdict.reason}"
            reason = _renamed(reason, first, second)
        elif order is None:
            by_text, spread = bradley_terry(len(self.texts), games)
            order = sorted(range(len(self.texts)), key=lambda number: (-by_text[number], number))
            scores, errors = self._by_completion(by_text), self._by_completion(spread)
        circles = cycles(self._beats())
        return Ranking(
            id=id, method=method, reason=reason, scores=scores, standard_errors=errors,
            ranking=None if reason or order is None else tuple(place for text in order for place in self._places[text]),
            comparisons=tuple(
                replace(played, first=self._places[played.first][0], second=self._places[played.second][0])
                for played in self._played
            ),
            cycles=tuple(tuple(self._places[text][0] for text in circle) for circle in circles),
            flags=self._flags(len(circles)), model=self._judge.model, settings=self._judge.settings_hash,
        )  # fmt: skip

    def _beats(self) -> dict[int, set[int]]:
        beats: dict[int, set[int]] = {}
        for played in self._played:
            if played.winner is not None:
                beats.setdefault(played.winner, set()).add(played.first + played.second - played.winner)
        return beats

    def _by_completion(self, values: Floats) -> tuple[float, ...]:
        by_place = {place: value for places, value in zip(self._places, values, strict=True) for place in places}
        return tuple(round(float(by_place[place]), DECIMALS) for place in sorted(by_place))

    def _flags(self, circles: int) -> tuple[str, ...]:
        flags = [f"identical:{','.join(map(str, places))}" for places in self._places if len(places) > 1]
        if circles:
            flags.append(f"intransitive:{circles}{'+' if circles >= MOST_CYCLES else ''}")
        for played in self._played:
            first, second = self._places[played.first][0], self._places[played.second][0]
            flags += [_renamed(flag, first, second) for flag in played.verdict.flags]
            if played.verdict.winner is None:
                flags.append(f"no-verdict:{first},{second}")
        return tuple(dict.fromkeys(flags))


def compare(judge: Judge, prompt: str, texts: Sequence[str], batch: Batch) -> list[Verdict]:
    """Judge pairs of texts, given by index, in the orders that the judge's settings ask for.

    Each order is handed over by itself, sorted by the text shown first and then the other, so that the beginnings
    that prompts share stand next to each other and are computed once. Votes share their own prompt, and when to stop
    taking them is decided for both orders together.
    """
    if judge.settings.votes > 1:
        with closing(
            judge.grouped().many(Pair(prompt, texts[first], texts[second]) for first, second in batch)
        ) as taken:
            return list(taken)
    both = judge.settings.orders == "both"
    shown = sorted({*batch, *((second, first) for first, second in batch if both)})
    one_order = judge.with_settings(orders="ab").grouped()
    with closing(one_order.many(Pair(prompt, texts[first], texts[second]) for first, second in shown)) as verdicts:
        found = dict(zip(shown, verdicts, strict=True))
    if both:
        return [_joined(judge, found[first, second], found[second, first]) for first, second in batch]
    return [replace(found[pair], settings=judge.settings_hash) for pair in batch]


def _joined(judge: Judge, forward: Verdict, backward: Verdict) -> Verdict:
    """One verdict of a pair judged as given and, by itself, swapped; as a judge of both orders would give it."""
    swapped = swap(backward)
    flags = tuple(dict.fromkeys([*forward.flags, *swapped.flags]))
    both = replace(forward, flags=flags, settings=judge.settings_hash)
    if forward.winner is None or swapped.winner is None:
        reason = forward.reason or swapped.reason
        return replace(both, winner=None, p_a=None, margin=None, consistent=None, reason=reason, orders=())
    orders = (*forward.orders, *swapped.orders)
    return replace(both, orders=orders, **conclude(orders))


def swap(verdict: Verdict) -> Verdict:
    """The same verdict with response_a and response_b exchanged."""
    orders = [
        replace(
            order, order="ba" if order.order == "ab" else "ab", verdict=OTHER[order.verdict], p_a=_rest(order.p_a),
            margin=_negative(order.margin), votes={"A": order.votes.get("B", 0), "B": order.votes.get("A", 0)},
        )
        for order in verdict.orders
    ]  # fmt: skip
    return replace(
        verdict, winner=OTHER[verdict.winner], p_a=_rest(verdict.p_a), margin=_negative(verdict.margin),
        orders=tuple(sorted(orders, key=lambda order: order.order)),
        flags=tuple(_exchanged(flag) for flag in verdict.flags),
        reason=verdict.reason and _exchanged(verdict.reason),
    )  # fmt: skip


def _rest(probability: float | None) -> float | None:
    return None if probability is None else round(1 - probability, DECIMALS)


def _negative(margin: float | None) -> float | None:
    return None if margin is None else 0.0 - margin


def _exchanged(text: str) -> str:
    return _RESPONSE.sub(lambda match: "response_b" if match[1] == "a" else "response_a", text)


def _renamed(text: str, first: int, second: int) -> str:
    return _RESPONSE.sub(lambda match: f"completion_{first if match[1] == 'a' else second}", text)


def _connected(count: int, games: Sequence[tuple[int, int, float]]) -> bool:
    """Whether every two completions are linked by comparisons, so that their scores can be compared."""
    linked = {0}
    while grown := {end for first, second, _ in games for end in (first, second) if {first, second} & linked} - linked:
        linked |= grown
    return len(linked) == count
