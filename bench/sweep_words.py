"""What a sweep found, in sentences that claim no more than was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .comparison import RunComparison
from .statistics import holm, pareto_front
from .summary import SIGNIFICANT
from .sweep_result import SweepResult
from .table import megabytes, p_value, percent, points, rate, with_interval


def what_it_says(swept: SweepResult) -> list[str]:
    """Sentences on the first table: margin error in order, flips, accuracy with what could be seen at all, the front."""
    suite, comparisons = next(iter(swept.comparisons.items()))
    failed = [f"{entry.name} could not be measured: {entry.failure}" for entry in swept.entries if entry.failure]
    if not comparisons:
        return failed
    return [
        margin_sentence(swept, comparisons),
        flips_sentence(comparisons),
        accuracy_sentence(swept, comparisons),
        *front_sentence(swept, comparisons),
        *failed,
    ]


def margin_sentence(swept: SweepResult, comparisons: Mapping[str, RunComparison]) -> str:
    changes = {name: comparison.measures["margin"].change for name, comparison in comparisons.items()}
    order = sorted(changes, key=lambda name: changes[name].value)
    listed = " < ".join(f"{name} {changes[name].value:.3f}" for name in order)
    text = f"Mean |margin error| against {swept.base.name}, in nats, from best to worst: {listed}."
    close = [
        f"{first} and {second}"
        for first, second in zip(order, order[1:], strict=False)
        if changes[second].low <= changes[first].high
    ]
    return f"{text} Intervals of these neighbours overlap: {', '.join(close)}." if close else text


def flips_sentence(comparisons: Mapping[str, RunComparison]) -> str:
    changes = {name: comparison.measures["flips"].change for name, comparison in comparisons.items()}
    least, most = (pick(changes, key=lambda name: changes[name].value) for pick in (min, max))
    table = comparisons[most].table
    span = f"{rate(changes[most])} % with {most}"
    if least != most:
        span = f"from {rate(changes[least])} % with {least} to {span}"
    return (
        f"Verdicts that changed: {span}. Of {most}'s, {table['lost']} went from right to wrong and {table['gained']} from wrong to "
        "right: accuracy sees only the difference of these two."
    )


def accuracy_sentence(swept: SweepResult, comparisons: Mapping[str, RunComparison]) -> str:
    adjusted = holm([comparison.p for comparison in comparisons.values()])
    found = [
        f"{name} ({with_interval(comparison.measures['accuracy'].change, points)} points, p {p_value(p)})"
        for (name, comparison), p in zip(comparisons.items(), adjusted, strict=True)
        if p <= SIGNIFICANT
    ]
    seen = [comparison.detectable for comparison in comparisons.values() if comparison.detectable is not None]
    power = ""
    if seen:
        least, most = percent(min(seen)), percent(max(seen))
        span = least if least == most else f"{least} (where few verdicts change) to {most}"
        power = f" True differences of {span} points would be found four times in five."
    if found:
        return f"Accuracy differs significantly from {swept.base.name}'s, corrected for the number of types: {', '.join(found)}.{power}"
    return (
        f"No type's accuracy differs significantly from {swept.base.name}'s, corrected for the number of types; "
        f"that is no proof of equality.{power}"
    )


def front_sentence(swept: SweepResult, comparisons: Mapping[str, RunComparison]) -> list[str]:
    """Which types no smaller one matches in margin error."""
    known = [entry for entry in swept.entries if entry.name in comparisons and entry.size_bytes]
    errors = {entry.name: comparisons[entry.name].measures["margin"].change.value for entry in known}
    known = [entry for entry in known if math.isfinite(errors[entry.name])]
    front = pareto_front([float(entry.size_bytes or 0) for entry in known], [-errors[entry.name] for entry in known])
    best = sorted((known[index] for index in front), key=lambda entry: entry.size_bytes or 0)
    if len(known) < 2:
        return []
    listed = ", ".join(
        f"{entry.name} ({megabytes(entry.size_bytes or 0)} MB, {errors[entry.name]:.3f} nats)" for entry in best
    )
    return [f"No file of the same size or smaller keeps the margins better than these: {listed}."]
