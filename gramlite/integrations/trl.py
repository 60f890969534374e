"""Rewards for TRL: a reward function for GRPOTrainer.

It follows TRL's documented signature by its shape alone, so TRL need not be installed to import this file:

    trainer = GRPOTrainer(model=..., reward_funcs=win_rate_reward(judge), ...)   # TRL 0.16 and later
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

from gramlite.errors import InputError
from gramlite.judging.judge import Judge
from gramlite.judging.pair import Pair, Verdict
from gramlite.ranking.rank import compare
from gramlite.rows.conversations import conversation, parse_messages, split

Text = str | Sequence[Mapping[str, Any]]
RewardFunction = Callable[..., list[float | None]]


class Removed(InputError, ImportError):
    """A name of an earlier version; the message says what there is in its place."""


def __getattr__(name: str) -> Any:
    if name == "PairwiseJudge":
        raise Removed(
            "PairwiseJudge was removed, as TRL has removed judges. Use win_rate_reward(judge) with GRPOTrainer."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def win_rate_reward(
    judge: Judge, *, reference: str | None = None, outcome: Literal["probability", "win"] = "probability"
) -> RewardFunction:
    """A function for GRPOTrainer's `reward_funcs` that rewards winning against others.

    Without `reference`, a completion's reward is the mean outcome against the other completions of its prompt in the
    call; with it, the outcome against the completion in the dataset's column of that name. An outcome is the judge's
    probability of winning, or with "win" 1, 0.5 or 0. Equal completions count one half against each other. The reward
    is None, which TRL leaves out, where there is nothing to compare with or no verdict, and for a completion that is no
    text; those beside it have theirs.
    """

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts came with {len(completions)} completions.")
        if reference is None:
            return _within_groups(judge, list(map(_read, prompts, completions)), outcome)
        if reference not in columns:
            raise InputError(f"The dataset has no column {reference!r} to compare completions with.")
        read = [_read(*texts) for texts in zip(prompts, completions, columns[reference], strict=True)]
        pairs = [Pair(question, first, second) for question, (first, second) in filter(None, read)]
        with closing(judge.many(pairs)) as verdicts:
            return [_outcome(next(verdicts), outcome) if found else None for found in read]

    reward.__name__ = "gramlite_win_rate"  # what TRL calls it in its logs
    return reward


def _read(prompt: Text, *completions: Text) -> tuple[str, list[str]] | None:
    """The question and the responses as texts, None where one of them is none."""
    try:
        sides = {
            f"completion {index}": parse_messages(value, "it", "assistant") for index, value in enumerate(completions)
        }
        return split([parse_messages(prompt, "the prompt")], sides)
    except InputError:
        return None


def _within_groups(judge: Judge, read: Sequence[tuple[str, list[str]] | None], outcome: str) -> list[float | None]:
    answers = {index: found[1][0] for index, found in enumerate(read) if found}
    groups: dict[str, list[int]] = {}
    for index, found in enumerate(read):
        if found:
            groups.setdefault(found[0], []).append(index)
    rewards: list[float | None] = [None] * len(read)
    for question, members in groups.items():
        texts = list(dict.fromkeys(answers[index] for index in members))
        pairs = [(first, second) for second in range(len(texts)) for first in range(second)]
        verdicts = compare(judge, question, texts, pairs)
        against: dict[tuple[int, int], float] = {}
        for (first, second), verdict in zip(pairs, verdicts, strict=True):
            won = _outcome(verdict, outcome)
            if won is not None:
                against[first, second], against[second, first] = won, 1 - won
        number = {text: index for index, text in enumerate(texts)}
        for index in members:
            own = number[answers[index]]
            others = [number[answers[other]] for other in members if other != index]
            results = [0.5 if own == other else against.get((own, other)) for other in others]
            known = [result for result in results if result is not None]
            rewards[index] = sum(known) / len(known) if known else None
    return rewards


def _outcome(verdict: Verdict, kind: str) -> float | None:
    if verdict.winner is None or verdict.p_a is None:
        return None
    return verdict.p_a if kind == "probability" else {"A": 1.0, "tie": 0.5, "B": 0.0}[verdict.winner]


def text_of(value: Text) -> str:
    """The text of a plain or a conversational prompt or completion; several messages are headed by their roles.

    Raises InputError for messages whose content is not text.
    """
    return conversation(value) if value != [] else ""
