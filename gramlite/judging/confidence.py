"""Calibrated confidence: a temperature and a position bias, fitted to pairs whose better response is known.

A judge's log-odds m in favour of the response shown first become (m - bias) / temperature, order by order; a pair's
p_a stays the mean of its orders' (Guo et al. 2017, "On Calibration of Modern Neural Networks", with an intercept).
The fit maximises the likelihood of the labels, in which a tie counts as half a win for each side. It is stored
beside the artifact and belongs to one model and one way of asking it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gramlite.errors import InputError, ModelError
from gramlite.formats.sidecar import belongs, read_sidecar, replaces, sidecar_path, write_sidecar

from .logistic import Floats, fit_logistic, sigmoid
from .pair import Order, Verdict, Winner
from .settings import digest_without

Rows = NDArray[np.int64]

FEWEST_PAIRS = 20
BINS = 10
LEAST_SHARE = 0.1  # of the judgements whose better response is shown first, or second
FOLDS = 5
RESAMPLES = 2000
TEMPERATURES = (0.05, 100.0)  # where labels and margins agree perfectly, or not at all, the likelihood has no maximum
WEAK = 1e-6  # penalty that keeps Newton's method finite there; it moves an ordinary fit by less than 1e-6
OUTCOMES = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a model's margins are rescaled, and what they belong to.

    `bias` is in nats and positive where the judge leans to the response shown first. `model` and `adapter`
    (sha256 or None), `settings` (see `order_settings`) and `quantization`, as the model was loaded, say what it may be
    applied to. `report` holds the expected calibration error before and after, as `assess` gives it.
    """

    temperature: float
    bias: float
    model: str | None
    adapter: str | None
    settings: str
    report: Mapping[str, Any]
    quantization: str | None = None

    def apply(self, margin: float, order: Order) -> float:
        """The calibrated log-odds of an order's un-swapped margin (positive favours response_a), in nats."""
        return (margin - self.bias if order == "ab" else margin + self.bias) / self.temperature

    def belongs_to(self, model: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
        return belongs(asdict(self), model, order_settings(settings))


@dataclass(frozen=True)
class Labelled:
    """Judged pairs with labels: un-swapped margins, NaN where an order was not judged, and outcomes of response_a.

    `groups` numbers the prompts, so that pairs of one prompt are resampled and held out together.
    """

    ab: Floats
    ba: Floats
    outcomes: Floats
    groups: Rows

    def __len__(self) -> int:
        return len(self.outcomes)

    def take(self, rows: Sequence[int] | Rows) -> Labelled:
        return Labelled(self.ab[rows], self.ba[rows], self.outcomes[rows], self.groups[rows])


def labelled(rows: Iterable[tuple[Verdict | Mapping[str, Any], Winner | None, str]], *, ties: bool = True) -> Labelled:
    """Collect (verdict or its JSON row, label, prompt); rows without a verdict of the model or a label are left out.

    With `ties` false the pairs labelled as ties are left out too.
    """
    margins: list[dict[str, float]] = []
    outcomes: list[float] = []
    groups: list[int] = []
    numbers: dict[str, int] = {}
    for verdict, label, prompt in rows:
        row = verdict.to_json() if isinstance(verdict, Verdict) else verdict
        orders = {order["order"]: order["margin"] for order in row["orders"] if order["margin"] is not None}
        if orders and label is not None and (ties or label != "tie"):
            margins.append(orders)
            outcomes.append(OUTCOMES[label])
            groups.append(numbers.setdefault(prompt, len(numbers)))
    ab, ba = (np.array([row.get(order, np.nan) for row in margins], dtype=np.float64) for order in ("ab", "ba"))
    return Labelled(ab, ba, np.array(outcomes, dtype=np.float64), np.array(groups, dtype=np.int64))


def require_enough(count: int) -> None:
    """Raise InputError unless so many judged pairs with a label make a calibration."""
    if count < FEWEST_PAIRS:
        raise InputError(
            f"{count} judged pairs have a label and two different responses; a calibration needs at least "
            f"{FEWEST_PAIRS}. Give more labelled pairs."
        )


def require_both_sides(won: Floats) -> None:
    """Raise InputError unless the response shown first is better in some judgements and worse in others.

    `won` says of each judgement how much better it is, 0 to 1. Where it always wins, as with chosen and rejected
    responses judged in one order, a lean to the first explains every label, and the bias fitted would be the labels'.
    """
    share = float(won.mean())
    if not LEAST_SHARE <= share <= 1 - LEAST_SHARE:
        raise InputError(
            f"The response shown first is the better one in {share:.0%} of the judgements, which cannot be told from a "
            "judge that leans to one side. Add --orders both, or shuffle which response is A."
        )


def fit(data: Labelled, *, fewest: int = FEWEST_PAIRS) -> tuple[float, float]:
    """The temperature and the bias that make the labels most likely; the temperature stays within TEMPERATURES.

    Raises InputError for fewer than `fewest` pairs.
    """
    if len(data) < fewest:
        raise InputError(f"{len(data)} judged pairs have a label; a calibration needs at least {fewest}.")
    first, won = judgements(data)
    ones = np.ones((len(first), 1))
    (slope, intercept), _ = fit_logistic(np.column_stack([first, ones]), won, WEAK * np.eye(2))
    bounded = float(np.clip(slope, 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]))
    if bounded != slope:
        (intercept,), _ = fit_logistic(ones, won, WEAK * np.eye(1), offset=bounded * first)
    return 1 / bounded, -float(intercept) / bounded


def judgements(data: Labelled) -> tuple[Floats, Floats]:
    """Of every pair and order that was judged, the log-odds of the response shown first and whether it is better."""
    first = np.concatenate([data.ab, -data.ba])
    won = np.concatenate([data.outcomes, 1 - data.outcomes])
    return first[~np.isnan(first)], won[~np.isnan(first)]


def probabilities(data: Labelled, temperature: float = 1.0, bias: float = 0.0) -> Floats:
    """Each pair's p_a: the mean over its judged orders."""
    orders = np.stack([(data.ab - bias) / temperature, (data.ba + bias) / temperature])
    result: Floats = np.nanmean(sigmoid(orders), axis=0)
    return result


def expected_calibration_error(p_a: Floats, outcomes: Floats, *, bins: int = BINS) -> float:
    """The mean gap between confidence and accuracy over bins of equal width of confidence in [0.5, 1] (Naeini 2015).

    Confidence is the probability of the preferred side; the accuracy on a tie is one half.
    """
    confidence = np.maximum(p_a, 1 - p_a)
    accuracy = np.where(p_a >= 0.5, outcomes, 1 - outcomes)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=confidence - accuracy, minlength=bins)
    return float(np.abs(gaps).sum() / len(p_a))


def below_chance(data: Labelled) -> tuple[int, int, float] | None:
    """Where the judge is right on significantly fewer than half of the pairs: on how many, of how many, and the p.

    Pairs that are a tie by their label or by the judge do not count. The test is the exact binomial one, two-sided,
    at 5 %.
    """
    p_a = probabilities(data)
    told = (data.outcomes != 0.5) & (p_a != 0.5)
    right, count = int(np.sum((p_a > 0.5) == (data.outcomes > 0.5), where=told)), int(told.sum())
    logs = (math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(right + 1))
    p = 2 * sum(math.exp(log - count * math.log(2)) for log in logs)
    return (right, count, p) if p < 0.05 else None


def held_out(data: Labelled, *, folds: int = FOLDS, seed: int = 0) -> Floats:
    """Each pair's calibrated p_a from a fit on the other folds.

    Prompts are not split between folds, unless there are fewer of them than folds.
    """
    members = independent(data, folds)
    groups = np.unique(members)
    fold = np.random.default_rng(seed).permutation(len(groups)) % folds
    of_row = fold[np.searchsorted(groups, members)]
    p_a = np.empty(len(data))
    for number in range(folds):
        test = np.flatnonzero(of_row == number)
        if len(test):
            p_a[test] = probabilities(data.take(test), *fit(data.take(np.flatnonzero(of_row != number)), fewest=1))
    return p_a


def independent(data: Labelled, folds: int = FOLDS) -> Rows:
    """The number of each pair's prompt or, where prompts are fewer than folds, a number of its own."""
    few = len(np.unique(data.groups)) < folds
    return np.arange(len(data), dtype=np.int64) if few else data.groups


def assess(data: Labelled, before: Floats, after: Floats, *, seed: int = 0) -> dict[str, Any]:
    """Calibration error before and after and its fall, each as [value, low, high]: 95 % bootstrap over prompts.

    `fall` is a fraction of the error before. The accuracies count a tie as one half. `resampled` says "pairs" where
    there were too few prompts to draw; the intervals then hold for other pairs of these prompts alone.
    """

    def measure(rows: Rows) -> tuple[float, float, float]:
        errors = [expected_calibration_error(p[rows], data.outcomes[rows]) for p in (before, after)]
        return errors[0], errors[1], 1 - errors[1] / errors[0] if errors[0] else 0.0

    members = independent(data)
    drawn = np.array([measure(rows) for rows in _resampled(members, seed)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    values = measure(np.arange(len(data)))
    names = ("error_before", "error_after", "fall")
    report = {name: [round(float(x), 6) for x in (values[i], low[i], high[i])] for i, name in enumerate(names)}
    accuracy = [float(np.where(p >= 0.5, data.outcomes, 1 - data.outcomes).mean()) for p in (before, after)]
    counts = {"pairs": len(data), "prompts": len(np.unique(data.groups)), "ties": int(np.sum(data.outcomes == 0.5))}
    return {
        **counts, **report, "accuracy_before": round(accuracy[0], 6), "accuracy_after": round(accuracy[1], 6),
        "bins": BINS, "resamples": RESAMPLES, "resampled": "prompts" if members is data.groups else "pairs", "seed": seed,
    }  # fmt: skip


def _resampled(groups: Rows, seed: int) -> Iterable[Rows]:
    """Row numbers of bootstrap samples that draw whole groups."""
    random = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for _ in range(RESAMPLES):
        yield np.concatenate([members[group] for group in random.integers(0, len(members), len(members))])


def calibrate(data: Labelled, model: Mapping[str, Any], settings: Mapping[str, Any], *, seed: int = 0) -> Calibration:
    """Fit a calibration for a judge's `model` and `settings_record`, and say what it is worth on held-out folds.

    Raises InputError for too few labels, and where they all say the same of the response shown first.
    """
    require_enough(len(data))
    require_both_sides(judgements(data)[1])
    temperature, bias = fit(data)
    report = assess(data, probabilities(data), held_out(data, seed=seed), seed=seed)
    return Calibration(
        temperature=temperature, bias=bias, model=model.get("sha256"), adapter=model.get("adapter"),
        settings=order_settings(settings), report=report | {"folds": FOLDS}, quantization=model.get("quantization"),
    )  # fmt: skip


def order_settings(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of what one order's margin depends on: which orders are judged and a seed do not count."""
    return digest_without(settings, "orders", "seed", "calibration")


def store(artifact: Path, calibration: Calibration) -> Path:
    """Store a calibration beside its artifact, in place of an older one of the same model and settings."""
    entry = asdict(calibration)
    return write_sidecar(artifact, "calibrations", entry, partial(replaces, entry))


def stored_calibration(artifact: Path, model: Mapping[str, Any], settings: Mapping[str, Any]) -> Calibration:
    """The calibration stored for a judge; raises InputError that says what is there and what to type."""
    entries = read_sidecar(artifact).get("calibrations", [])
    try:
        found = [Calibration(**{key: entry[key] for key in entry if key != "companion"}) for entry in entries]
        usable = all(float(c.temperature) > 0 and np.isfinite(float(c.temperature) + float(c.bias)) for c in found)
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise ModelError(f"{sidecar_path(artifact)} is no calibration. Delete it, and run gramlite calibrate again.")
    for entry, calibration in zip(entries, found, strict=True):
        if belongs(entry, model, order_settings(settings)):
            return calibration
    has = (
        f"{sidecar_path(artifact)} holds {len(found)} for another model or other settings"
        if found
        else "none is stored"
    )
    raise InputError(
        f"There is no calibration for this judge: {has}. Type: gramlite calibrate PAIRS.jsonl -m {artifact}"
    )
