"""How long a judge needs to think: accuracy against the think budget, measured on labelled pairs.

A rationale that ends by itself is the same under every larger budget, greedy or sampled, since each generation has a
seed of its own. So the largest budget is judged first, and a smaller one judges only the pairs whose rationale it
would cut short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gramlite.errors import InputError, ModelError
from gramlite.formats.sidecar import belongs, read_sidecar, replaces, sidecar_path, write_sidecar

from .judge import Judge
from .logistic import Floats
from .pair import Pair, Verdict
from .settings import digest_without

BUDGETS = (16, 32, 64, 128, 256, 512, 1024)
FEWEST_PAIRS = 20
NORMAL_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """One line of the table. Accuracies are fractions, a verdict of tie counts one half; the interval is Wilson's, 95 %.

    `behind` is how far the accuracy lies behind the best budget's, `noise` the standard error of that difference on
    the same pairs. `cut` is the fraction of rationales closed by force, `tokens` the mean generated for an order.
    """

    budget: int
    accuracy: float
    low: float
    high: float
    behind: float
    noise: float
    cut: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class BudgetTable:
    """Accuracy by budget on `pairs` labelled pairs, and the `chosen` knee: see `choose`."""

    chosen: int
    pairs: int
    rows: tuple[BudgetRow, ...]
    model: str | None
    adapter: str | None
    settings: str
    quantization: str | None = None


def measure(
    judge: Judge,
    pairs: Sequence[Pair],
    *,
    budgets: Sequence[int] = BUDGETS,
    on_verdict: Callable[[], None] = lambda: None,
) -> tuple[BudgetTable, list[Verdict]]:
    """The table for a judge on pairs labelled A or B, and the verdicts at the chosen budget, in the order of `pairs`.

    Pairs without such a label, or without a verdict at some budget, do not count. `on_verdict` is called after each.
    Raises InputError for a judge that does not think, for too few pairs, and for fewer than two budgets.
    """
    descending = sorted(set(budgets), reverse=True)
    if judge.settings.mode != "think":
        raise InputError("A judge in direct mode has no think budget. Drop --mode direct, or --budget auto.")
    if len(descending) < 2:
        raise InputError("Measuring budgets needs at least two of them.")
    _require_enough(sum(pair.label in ("A", "B") for pair in pairs))
    verdicts: dict[int, list[Verdict]] = {}
    for budget in descending:
        previous = verdicts.get(min(verdicts, default=0))
        verdicts[budget] = _judged(judge.with_settings(budget=budget), pairs, previous, on_verdict)
    counted = [
        index
        for index, pair in enumerate(pairs)
        if pair.label in ("A", "B") and all(column[index].winner for column in verdicts.values())
    ]
    _require_enough(len(counted))
    correct = {
        budget: np.array([_correct(column[index], pairs[index]) for index in counted])
        for budget, column in sorted(verdicts.items())
    }
    chosen = choose(correct)
    rows = tuple(_row(budget, correct, [verdicts[budget][index] for index in counted]) for budget in correct)
    table = BudgetTable(
        chosen=chosen, pairs=len(counted), rows=rows, model=judge.model.get("sha256"),
        adapter=judge.model.get("adapter"), settings=settings_without_budget(judge.settings_record),
        quantization=judge.model.get("quantization"),
    )  # fmt: skip
    return table, verdicts[chosen]


def _require_enough(count: int) -> None:
    if count < FEWEST_PAIRS:
        raise InputError(f"{count} pairs have a label A or B and a verdict; at least {FEWEST_PAIRS} are needed.")


def choose(correct: Mapping[int, Floats]) -> int:
    """The smallest budget whose accuracy is within one standard error of the best budget's, on the same pairs.

    `correct` maps each budget to how right each pair's verdict was, 0 to 1. The rule is the one-standard-error rule
    of Breiman et al. 1984 with the standard error of the paired difference.
    """
    best = _best(correct)
    within = [budget for budget, values in correct.items() if np.subtract(*_gap(best, values)) <= 1e-12]
    return min(within)


def _best(correct: Mapping[int, Floats]) -> Floats:
    return max(correct.values(), key=lambda values: float(values.mean()))


def _gap(best: Floats, values: Floats) -> tuple[float, float]:
    """How far `values` lie behind, and the standard error of that."""
    difference = best - values
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _judged(
    judge: Judge, pairs: Sequence[Pair], longer: Sequence[Verdict] | None, on_verdict: Callable[[], None]
) -> list[Verdict]:
    """Verdicts under a budget, taken over from a larger one's where no rationale went beyond this one."""
    budget = judge.settings.budget
    found = list(longer) if longer else []
    asked = [index for index in range(len(pairs)) if not longer or _was_longer(longer[index], budget)]
    with closing(judge.many(pairs[index] for index in asked)) as verdicts:
        for index, verdict in zip(asked, verdicts, strict=True):
            if longer:
                found[index] = verdict
            else:
                found.append(verdict)
            on_verdict()
    return found


def _was_longer(verdict: Verdict, budget: int) -> bool:
    return verdict.winner is None or any(order.tokens["generated"] > budget for order in verdict.orders)


def _correct(verdict: Verdict, pair: Pair) -> float:
    return 0.5 if verdict.winner == "tie" else float(verdict.winner == pair.label)


def _row(budget: int, correct: Mapping[int, Floats], verdicts: Sequence[Verdict]) -> BudgetRow:
    values = correct[budget]
    n, accuracy = len(values), float(values.mean())
    centre = (accuracy + NORMAL_95**2 / (2 * n)) / (1 + NORMAL_95**2 / n)
    half = NORMAL_95 / (1 + NORMAL_95**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + NORMAL_95**2 / (4 * n * n))
    behind, noise = _gap(_best(correct), values)
    orders = [order for verdict in verdicts for order in verdict.orders]
    figures = {
        "accuracy": accuracy, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "behind": behind,
        "noise": noise, "cut": float(np.mean([order.forced for order in orders])) if orders else 0.0,
        "tokens": float(np.mean([order.tokens["generated"] for order in orders])) if orders else 0.0,
    }  # fmt: skip
    return BudgetRow(budget=budget, **{name: round(value, 6) for name, value in figures.items()})


def settings_without_budget(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of everything else that a verdict depends on."""
    return digest_without(settings, "budget", "seed", "calibration")


def store(artifact: Path, table: BudgetTable) -> Path:
    """Store a table beside its artifact, in place of an older one of the same model and settings."""
    entry = asdict(table)
    return write_sidecar(artifact, "budgets", entry, partial(replaces, entry))


def stored_budget(artifact: Path, model: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """The budget chosen for a judge's model and `settings_record`; raises InputError that says what to type."""
    for entry in read_sidecar(artifact).get("budgets", []):
        if belongs(entry, model, settings_without_budget(settings)):
            chosen = entry.get("chosen")
            if isinstance(chosen, int) and chosen > 0:
                return chosen
            raise ModelError(f"{sidecar_path(artifact)} holds no usable budget. Delete it, and measure again.")
    raise InputError(
        "No think budget was measured for this judge with these settings. Type: "
        f"gramlite calibrate PAIRS.jsonl -m {artifact} --budget auto"
    )
