"""What one run lost against another, pair by pair, and how sure that is.

Everything is computed on the rows that both runs have. Rows without a verdict are counted and left out, never
guessed. Where several rows share a prompt, intervals treat the prompt as the unit (see `statistics`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gramlite.errors import InputError
from gramlite.rows import identifier_text

from . import statistics
from .folder import Row, Run
from .measures import (
    Measure,
    Paired,
    clusters_of,
    flipped,
    gold_line,
    gold_measures,
    is_right,
    label_of,
    measures_of,
    right_change,
    subset_of,
)
from .statistics import Estimate

# what became of a labelled pair, by whether the base and the run are right
AGREEMENT = {"both": (True, True), "lost": (True, False), "gained": (False, True), "neither": (False, False)}


@dataclass(frozen=True)
class SubsetChange:
    """A subset's accuracy change and flips; `p_holm` is McNemar's exact p adjusted for the number of subsets."""

    name: str
    rows: int
    accuracy: Estimate
    flips: Estimate
    p: float
    p_holm: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "accuracy": self.accuracy.to_json(), "flips": self.flips.to_json()}


@dataclass(frozen=True)
class RunComparison:
    """Two runs compared. `counts` says which rows were used; `table` is the 2 by 2 table of right and wrong.

    `detectable` is the smallest true accuracy difference that this many pairs find four times in five, None
    where there are too few pairs for any; `design_effect` is how much shared prompts inflate the variance. `gold` is
    what is said of each side beside the measures from gold, where gold verdicts were given.
    """

    base: str
    run: str
    counts: Mapping[str, int]
    measures: Mapping[str, Measure]
    table: Mapping[str, int]
    p: float
    discordance: float
    detectable: float | None
    design_effect: float
    subsets: Sequence[SubsetChange] = ()
    notes: Sequence[str] = ()
    seed: int = 0
    scores: Mapping[str, Any] = field(default_factory=dict)
    gold: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base, "run": self.run, "counts": dict(self.counts),
            "measures": {name: measure.to_json() for name, measure in self.measures.items()},
            "table": dict(self.table), "mcnemar_p": self.p, "discordance": self.discordance,
            "detectable": self.detectable, "design_effect": self.design_effect,
            "subsets": [subset.to_json() for subset in self.subsets], "notes": list(self.notes),
            "scores": dict(self.scores), "confidence": statistics.CONFIDENCE, "seed": self.seed,
            "resamples": statistics.RESAMPLES, **({"gold": dict(self.gold)} if self.gold else {}),
        }  # fmt: skip

    def pairs_needed(self, difference: float) -> int | None:
        """How many labelled pairs of this kind would find a true accuracy difference (a fraction)."""
        needed = statistics.pairs_needed(difference, self.discordance)
        return None if needed is None else int(np.ceil(needed * self.design_effect))


def compare_runs(base: Run, run: Run, *, seed: int = 0, cluster: bool = True, gold: Run | None = None) -> RunComparison:
    """Compare a run with its base, and both with `gold`; with `cluster` false every row counts as independent.

    Raises InputError when the runs share no rows, with each other or with gold, or disagree about a label.
    """
    matched = match_rows(base, run)
    everything = Paired(matched, clusters_of(matched) if cluster else None, seed)
    judged = everything.select(lambda a, b: a.get("verdict") is not None and b.get("verdict") is not None)
    labelled = judged.select(lambda a, b: label_of(a, b) in ("A", "B"))
    right = Counter((is_right(a, a, b), is_right(b, a, b)) for a, b in labelled.pairs)
    table = {name: right[sides] for name, sides in AGREEMENT.items()}
    moves = labelled.values(right_change)
    effect = statistics.design_effect(moves, labelled.clusters)
    n = len(labelled.pairs)
    discordance = (table["lost"] + table["gained"] + 1) / (n + 2)  # half a pair of each kind: none seen is not none
    counts = counts_of(base, run, matched, judged, labelled)
    measures = measures_of(everything, judged, labelled)
    if gold:
        measures |= gold_measures(judged, gold.rows)
    return RunComparison(
        base=base.name,
        run=run.name,
        counts=counts,
        measures=measures,
        table=table,
        p=statistics.mcnemar_exact(table["lost"], table["gained"]),
        discordance=discordance,
        detectable=statistics.minimum_detectable_effect(int(n / effect), discordance),
        design_effect=effect,
        subsets=subsets_of(judged, labelled),
        notes=[*notes_of(base, run, counts, effect), *(gold_notes(judged, gold) if gold else [])],
        seed=seed,
        scores={side.name: side.record["score"] for side in (base, run) if side.record.get("score")},
        gold=gold_figures(judged, gold) if gold else None,
    )


def match_rows(base: Run, run: Run) -> list[tuple[Row, Row]]:
    """The rows that both runs have, side by side; raises InputError for none and for labels that differ."""
    common = [identifier for identifier in base.rows if identifier in run.rows]
    if not common:
        raise InputError(f"{base.name} and {run.name} have no row in common. Compare runs of the same suite.")
    matched = [(base.rows[identifier], run.rows[identifier]) for identifier in common]
    for identifier, (first, second) in zip(common, matched, strict=True):
        if first.get("label") != second.get("label") and None not in (first.get("label"), second.get("label")):
            raise InputError(
                f"Row {identifier} is labelled {first['label']} in {base.name} and {second['label']} in {run.name}. "
                "These are runs of different data."
            )
    return matched


def gold_figures(judged: Paired, gold: Run) -> dict[str, Any]:
    """The name of gold, and the slope and the worst distance of each side's margins; raises InputError without any."""
    sides = zip(*judged.pairs, strict=True)
    base, run = (gold_line(rows, gold.rows) for rows in sides) if judged.pairs else ({}, {})
    if None in (base.get("worst"), run.get("worst")):
        raise InputError(f"{gold.name} has a margin of none of the rows that both runs judged. Is it of other pairs?")
    return {"name": gold.name, "base": base, "run": run}


def gold_notes(judged: Paired, gold: Run) -> list[str]:
    missing = sum(identifier_text(run.get("id")) not in gold.rows for _, run in judged.pairs)
    return [f"{missing} judged rows are not in {gold.name}; what is said of gold is on the others."] if missing else []


def subsets_of(judged: Paired, labelled: Paired) -> list[SubsetChange]:
    """Each subset by name; none where there is only one."""
    names = sorted({subset_of(*pair) for pair in judged.pairs})
    if len(names) < 2:
        return []
    found = []
    for name in names:
        rows = judged.select(lambda a, b, name=name: subset_of(a, b) == name)  # type: ignore[misc]
        right = labelled.select(lambda a, b, name=name: subset_of(a, b) == name)  # type: ignore[misc]
        moves = right.values(right_change)
        p = statistics.mcnemar_exact(int((moves < 0).sum()), int((moves > 0).sum()))
        found.append((name, len(rows.pairs), right.mean(right_change, step=1.0), rows.rate(flipped), p))
    adjusted = statistics.holm([p for *_, p in found])
    return [SubsetChange(*row, p_holm) for row, p_holm in zip(found, adjusted, strict=True)]


def counts_of(
    base: Run, run: Run, matched: Sequence[tuple[Row, Row]], judged: Paired, labelled: Paired
) -> dict[str, int]:
    return {
        "common": len(matched),
        "base_only": len(base.rows) - len(matched),
        "run_only": len(run.rows) - len(matched),
        "base_no_verdict": sum(first.get("verdict") is None for first, _ in matched),
        "run_no_verdict": sum(second.get("verdict") is None for _, second in matched),
        "judged": len(judged.pairs),
        "labelled": len(labelled.pairs),
        "labelled_tie": sum(label_of(*pair) == "tie" for pair in judged.pairs),
        "prompts": len(judged.pairs) if judged.clusters is None else len(set(judged.clusters)),
    }


def notes_of(base: Run, run: Run, counts: Mapping[str, int], effect: float) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = []
    if counts["base_only"] or counts["run_only"]:
        notes.append(
            f"{counts['base_only']} rows are only in {base.name} and {counts['run_only']} only in {run.name}; the "
            f"comparison is on the {counts['common']} in both."
        )
    if counts["base_no_verdict"] or counts["run_no_verdict"]:
        notes.append(
            f"Without a verdict, counted and left out: {counts['base_no_verdict']} rows of {base.name}, "
            f"{counts['run_no_verdict']} of {run.name}."
        )
    if counts["prompts"] < counts["judged"]:
        notes.append(
            f"{counts['judged']} rows share {counts['prompts']} prompts: intervals treat a prompt as the unit (design "
            f"effect {effect:.2f}); McNemar's p takes rows as independent."
        )
    for key in ("mode", "orders", "votes", "temperature", "budget", "template"):
        first, second = (_setting(side, key) for side in (base, run))
        if first != second and base.record and run.record:
            notes.append(f"The settings differ: {key} is {first} in {base.name} and {second} in {run.name}.")
    if base.record and run.record:
        texts = [i for i, row in base.rows.items() if i in run.rows and row.get("input") != run.rows[i].get("input")]
        if texts:
            notes.append(f"{len(texts)} common rows were judged from other texts in {run.name} than in {base.name}.")
    hashes = {side.suite.get("sha256") for side in (base, run)} - {None}
    if len(hashes) > 1:
        notes.append("The runs read different suite files; labels and ids agree on the common rows.")
    return notes


def _setting(side: Run, key: str) -> object:
    value = (side.record.get("settings") or {}).get(key)
    return value.get("name") if isinstance(value, dict) else value
