"""From generations to a verdict: votes make an order's margin, orders make the pair's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gramlite.generation.decoder import Generation, softmax_first

from .confidence import Calibration
from .pair import Order, OrderVerdict, Winner

DECIMALS = 6


def conclude(orders: Sequence[OrderVerdict]) -> dict[str, Any]:
    """A pair's winner, margin, p_a and consistency: GRAM's convention, the mean of the orders' probabilities."""
    margin = round(mean_log_odds([order.margin for order in orders if order.margin is not None]), DECIMALS)
    return {
        "winner": winner_of(margin),
        "p_a": round(softmax_first(margin), DECIMALS),
        "margin": margin,
        "consistent": len({order.verdict for order in orders}) == 1 if len(orders) > 1 else None,
    }


def conclude_order(
    order: Order, generations: Sequence[Generation], *, prompt_ids: tuple[int, ...], calibration: Calibration | None
) -> OrderVerdict:
    """Combine the votes of one order, un-swapped; `prompt_ids` are without the scaffold that opens the answer."""
    margins = [margin_of(generation, order) for generation in generations if generation.reads]
    margin = mean_log_odds(margins)
    if calibration:
        margin = calibration.apply(margin, order)
    margin = round(margin, DECIMALS)
    winners = [winner_of(vote) for vote in margins]
    return OrderVerdict(
        order=order,
        verdict=winner_of(margin),
        p_a=round(softmax_first(margin), DECIMALS),
        margin=margin,
        rationale=generations[0].thinking,
        forced=any(generation.forced for generation in generations),
        votes={side: winners.count(side) for side in ("A", "B")},
        tokens={
            "prompt": len(prompt_ids),
            "cached": min(generation.cached for generation in generations),
            "generated": sum(generation.generated for generation in generations),
        },
        prompt_ids=prompt_ids,
        generated_ids=generations[0].ids,
    )


def margin_of(generation: Generation, order: Order) -> float:
    """The log-odds in nats that a generation gives the pair's response_a, which stands second in the order "ba"."""
    first, second = generation.reads[0]
    return first - second if order == "ab" else second - first


def mean_log_odds(margins: list[float]) -> float:
    """The log-odds in nats of the mean probability, exact also where a probability rounds to 0 or 1."""
    array = np.asarray(margins, dtype=np.float64)
    if len(array) == 1:
        return float(array[0])
    return float(np.logaddexp.reduce(-np.logaddexp(0, -array)) - np.logaddexp.reduce(-np.logaddexp(0, array)))


def winner_of(margin: float) -> Winner:
    """The side of even odds."""
    return "tie" if margin == 0 else "A" if margin > 0 else "B"
