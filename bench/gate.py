"""A gate on a comparison: clauses such as `accuracy>=-1.0,flips<=3` that hold only when the interval's bound does.

A clause passes when the whole interval lies on its side of the limit, fails when the whole interval lies on
the other side, and is undecidable in between, which is a failure unless the caller says otherwise. Limits
of rates are in percent; what both runs have (accuracy, consistency, ...) is limited in its change, in
percentage points.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from gramlite.errors import GateError, InputError
from gramlite.storage import atomic_output
from gramlite.terminal import note, visible

from .comparison import RunComparison
from .measures import GOLD_MEASURES, MEASURES
from .statistics import pairs_to_settle, pairs_to_settle_rate

GATE = "gramlite gate"  # by which a file of outcomes is known again
Outcome = Literal["pass", "fail", "undecidable"]
CLAUSE = re.compile(r"^\s*([a-z_]+)\s*(>=|<=)\s*([-+]?\d+(?:\.\d+)?)\s*%?\s*$")
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


@dataclass(frozen=True)
class Clause:
    """One condition: a measure's name, the direction, and the limit as typed (percent for rates)."""

    measure: str
    relation: Literal[">=", "<="]
    limit: float

    def __str__(self) -> str:
        return f"{self.measure}{self.relation}{self.limit:g}"


@dataclass(frozen=True)
class GateFinding:
    """What became of a clause on one run. `pairs_needed` is None where it is decided or cannot be told."""

    clause: Clause
    run: str
    outcome: Outcome
    sentence: str
    pairs_needed: int | None = None

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"clause": str(self.clause)}


def parse_gate(text: str) -> list[Clause]:
    """Read clauses separated by commas; raises InputError that names the measures there are."""
    clauses = []
    for part in text.split(","):
        matched = CLAUSE.match(part)
        if not matched or matched[1] not in (*MEASURES, *GOLD_MEASURES):
            raise InputError(
                f"--gate cannot read {part.strip()!r}. Write clauses such as accuracy>=-1.0,flips<=3. "
                f"The measures are: {', '.join(MEASURES)}; with --gold also {', '.join(GOLD_MEASURES)}."
            )
        clauses.append(Clause(matched[1], ">=" if matched[2] == ">=" else "<=", float(matched[3])))
    return clauses


def evaluate(comparison: RunComparison, clauses: Iterable[Clause]) -> list[GateFinding]:
    """Test each clause on a comparison."""
    return [_finding(comparison, clause) for clause in clauses]


def _finding(comparison: RunComparison, clause: Clause) -> GateFinding:
    measure = comparison.measures[clause.measure]
    change = measure.change
    limit = clause.limit / 100 if measure.unit == "rate" else clause.limit
    if change.n == 0 or not math.isfinite(change.value):
        sentence = f"{clause}: undecidable for {comparison.run}. No row has {measure.title}."
        return GateFinding(clause, comparison.run, "undecidable", sentence)
    outcome = outcome_of(change.low, change.high, clause.relation, limit)
    settle = pairs_to_settle if measure.base or measure.unit != "rate" else pairs_to_settle_rate
    needed = settle(change, limit) if outcome == "undecidable" else None
    return GateFinding(clause, comparison.run, outcome, _sentence(comparison, clause, outcome, needed), needed)


def outcome_of(low: float, high: float, relation: str, limit: float) -> Outcome:
    """Where an interval lies with regard to a limit, that which touches it being on the allowed side."""
    if relation == ">=":
        return "pass" if low >= limit else "fail" if high < limit else "undecidable"
    return "pass" if high <= limit else "fail" if low > limit else "undecidable"


def _sentence(comparison: RunComparison, clause: Clause, outcome: Outcome, needed: int | None) -> str:
    measure = comparison.measures[clause.measure]
    change = measure.change
    found = (
        f"{clause}: {outcome} for {comparison.run}. {measure.title[0].upper()}{measure.title[1:]}: "
        f"{measure.say(change.value)}, 95 % interval {measure.say(change.low)} to {measure.say(change.high)} "
        f"(n = {change.n:,})."
    )
    if outcome != "undecidable":
        return found
    if needed is None:
        return f"{found} The estimate is too close to the limit to say how many pairs would settle it."
    return f"{found} The interval contains the limit; about {needed:,} pairs would settle it."


def fails(finding: GateFinding, undecided: str) -> bool:
    """Whether a finding fails the gate when undecidable clauses are to "pass" or to "fail"."""
    return finding.outcome == "fail" or (finding.outcome == "undecidable" and undecided == "fail")


def enforce(findings: Sequence[GateFinding], *, undecided: str = "fail") -> None:
    """Raise GateError with a sentence for each clause that does not hold."""
    failed = [finding.sentence for finding in findings if fails(finding, undecided)]
    if failed:
        raise GateError("\n".join(["The gate failed.", *map(visible, failed)]))


def github_annotations(findings: Iterable[GateFinding], *, undecided: str = "fail") -> list[str]:
    """A workflow command for each finding, as GitHub Actions reads them from a log."""
    lines = []
    for finding in findings:
        level = "error" if fails(finding, undecided) else "notice" if finding.outcome == "pass" else "warning"
        title = f"gramlite gate: {finding.clause}"
        lines.append(f"::{level} title={_escaped(title, property=True)}::{_escaped(finding.sentence)}")
    return lines


def _escaped(text: str, *, property: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if property else text


@dataclass(frozen=True)
class Gate:
    """A gate as it was asked for: its clauses, what an undecidable one counts as, and who is told of the outcome."""

    clauses: Sequence[Clause]
    undecided: str
    junit: Path | None
    github: bool

    def evaluate(self, comparison: RunComparison) -> list[GateFinding]:
        """Test the clauses on a comparison."""
        return evaluate(comparison, self.clauses)

    def tell(self, findings: Sequence[GateFinding]) -> None:
        """Write and print the outcome where it was asked for; raises GateError where a clause does not hold."""
        if self.junit:
            write_junit(self.junit, findings, undecided=self.undecided)
        if self.github:
            note(*github_annotations(findings, undecided=self.undecided))
        enforce(findings, undecided=self.undecided)


def gate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a gate, and its function a `gate`."""

    @click.option(
        "--gate", metavar="CLAUSES", help="Conditions to hold, as in 'accuracy>=-1.0,flips<=3'; exit 7 if not."
    )
    @click.option(
        "--undecided",
        type=click.Choice(["pass", "fail"]),
        default="fail",
        show_default=True,
        help="What an undecidable clause counts as.",
    )
    @click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the outcome as JUnit XML.")
    @click.option("--github", is_flag=True, help="Annotate the outcome for GitHub Actions, on standard error.")
    @functools.wraps(command)
    def with_gate(*, gate: str | None, undecided: str, junit: Path | None, github: bool, **others: Any) -> Any:
        clauses = parse_gate(gate) if gate else []
        if (junit or github) and not clauses:
            raise InputError("--junit and --github tell what became of a gate; add --gate 'accuracy>=-1.0,flips<=3'.")
        if not others.get("gold") and (of_gold := [each for each in clauses if each.measure in GOLD_MEASURES]):
            raise InputError(f"{of_gold[0]} is a distance from gold margins: add --gold GOLD.jsonl to `bench compare`.")
        return command(gate=Gate(clauses, undecided, junit, github), **others)

    return with_gate


def write_junit(path: Path, findings: Sequence[GateFinding], *, undecided: str = "fail") -> None:
    """Write the findings as a JUnit XML file, a test suite for each run and a test case for each clause."""
    from xml.etree import ElementTree as xml

    root = xml.Element("testsuites", name=GATE)
    for run in dict.fromkeys(finding.run for finding in findings):
        own = [finding for finding in findings if finding.run == run]
        failures = sum(fails(finding, undecided) for finding in own)
        counts = {"tests": len(own), "failures": failures, "errors": 0, "skipped": 0}
        suite = xml.SubElement(root, "testsuite", {"name": _printable(run)} | {k: str(n) for k, n in counts.items()})
        for finding in own:
            case = xml.SubElement(suite, "testcase", classname=_printable(run), name=str(finding.clause))
            if fails(finding, undecided):
                xml.SubElement(case, "failure", type=finding.outcome, message=_printable(finding.sentence))
            xml.SubElement(case, "system-out").text = _printable(finding.sentence)
    with atomic_output(path, force=True) as temporary:
        xml.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Text without the characters that XML 1.0 cannot hold."""
    return NOT_XML.sub("\ufffd", text)
