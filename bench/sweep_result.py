"""What a sweep found: what became of each type, and its comparison with the first, suite by suite and pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .comparison import RunComparison, compare_runs
from .folder import Run

POOLED = "all suites"


@dataclass(frozen=True)
class SweepEntry:
    """What became of a type: its runs by suite, and, where it failed, why."""

    name: str
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    runs: Mapping[str, Run] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: the base's entry first, and each type's comparison with it by suite and type."""

    entries: Sequence[SweepEntry]
    comparisons: Mapping[str, Mapping[str, RunComparison]]

    @property
    def base(self) -> SweepEntry:
        return self.entries[0]

    def runs_of(self, suite: str) -> dict[str, Run]:
        """The runs of a suite by type, the base first; of all suites pooled, the types that have every one."""
        if suite != POOLED:
            return {entry.name: entry.runs[suite] for entry in self.entries if suite in entry.runs}
        whole = [entry for entry in self.entries if entry.runs.keys() == self.base.runs.keys()]
        return {entry.name: pooled(entry) for entry in whole}


def compare_all(entries: Sequence[SweepEntry], *, seed: int) -> SweepResult:
    """Compare every type with the first, by suite; with several suites, first over all of them pooled."""
    swept = SweepResult(entries, {})
    suites = list(swept.base.runs)
    found: dict[str, dict[str, RunComparison]] = {}
    for suite in [POOLED, *suites] if len(suites) > 1 else suites:
        base, *others = swept.runs_of(suite).values()
        found[suite] = {run.name: compare_runs(base, run, seed=seed) for run in others}
    return SweepResult(entries, found)


def pooled(entry: SweepEntry) -> Run:
    """A type's runs as one, its subsets the suites."""
    rows = {
        f"{suite}:{identifier}": {
            **row,
            "id": f"{suite}:{identifier}",
            "meta": {**row.get("meta", {}), "subset": suite},
        }
        for suite, run in entry.runs.items()
        for identifier, row in run.rows.items()
    }
    first = next(iter(entry.runs.values()))
    return Run(entry.name, first.path.parent, rows, {**first.record, "suite": {}, "score": None})
