"""Guessing what a judge writes next from what it wrote before: rationales share their headings and turns of phrase.

A guess is checked by the model in the same step that computes the next token, so it never changes what is written,
only how many steps that takes: speculative decoding (Leviathan et al., 2211.17192) with a table of n-grams as the
draft model.
"""

from __future__ import annotations

from collections.abc import Sequence

CONTEXT_TOKENS = 3
LEAST_LEAD = 3  # a wrong guess costs about a third of a step, a right one saves a whole one
MOST_CONTEXTS = 1 << 16


class Drafter:
    """For each run of three tokens the one that leads among its followers, and by how much (Boyer-Moore's vote)."""

    def __init__(self) -> None:
        self._leaders: dict[tuple[int, ...], tuple[int, int]] = {}

    def learn(self, tokens: Sequence[int], new: int) -> None:
        """Take note of the last `new` of `tokens`, each with the three before it."""
        for end in range(max(len(tokens) - new, CONTEXT_TOKENS), len(tokens)):
            context = tuple(tokens[end - CONTEXT_TOKENS : end])
            leader, lead = self._leaders.get(context, (tokens[end], 0))
            if leader == tokens[end]:
                self._leaders[context] = leader, lead + 1
            else:
                self._leaders[context] = (leader, lead - 1) if lead > 1 else (tokens[end], 1)
        if len(self._leaders) > MOST_CONTEXTS:
            self._leaders = {context: (token, lead) for context, (token, lead) in self._leaders.items() if lead > 1}
            if len(self._leaders) > MOST_CONTEXTS // 2:
                self._leaders.clear()

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that are likely to follow `tokens`; none where too little is known."""
        context = tuple(tokens[-CONTEXT_TOKENS:])
        guessed: list[int] = []
        while len(guessed) < most:
            token, lead = self._leaders.get(context, (0, 0))
            if lead < LEAST_LEAD:
                break
            guessed.append(token)
            context = (*context[1:], token)
        return guessed
