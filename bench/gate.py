"""A gate on a comparison: clauses such as `accuracy>=-1.0,flips<=3` that hold only when the interval's bound does.

A clause passes when the whole interval lies on its side of the limit, fails when the whole interval lies on
the other side, and is undecidable in between, which is a failure unless the caller says otherwise. Limits
of rates are in percent; what both runs have (accuracy, consistency, ...) is limited in its change, in
percentage points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gramlite.errors import GateError, InputError
from gramlite.storage import atomic_output
from gramlite.terminal import visible

from .compare import Comparison
from .measures import MEASURES
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
class Finding:
    """What became of a clause on one run. `pairs_needed` is None where it is decided or cannot be told."""

    clause: Clause
    run: str
    outcome: Outcome
    sentence: str
    pairs_needed: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "clause": str(self.clause), "run": self.run, "outcome": self.outcome, "sentence": self.sentence,
            "pairs_needed": self.pairs_needed,
        }  # fmt: skip


def parse_gate(text: str) -> list[Clause]:
    """Read clauses separated by commas; raises InputError that names the measures there are."""
    clauses = []
    for part in text.split(","):
        matched = CLAUSE.match(part)
        if not matched or matched[1] not in MEASURES:
            raise InputError(
                f"--gate cannot read {part.strip()!r}. Write clauses such as accuracy>=-1.0,flips<=3. "
                f"The measures are: {', '.join(MEASURES)}."
            )
        clauses.append(Clause(matched[1], ">=" if matched[2] == ">=" else "<=", float(matched[3])))
    return clauses


def evaluate(comparison: Comparison, clauses: Iterable[Clause]) -> list[Finding]:
    """Test each clause on a comparison."""
    return [_finding(comparison, clause) for clause in clauses]


def _finding(comparison: Comparison, clause: Clause) -> Finding:
    measure = comparison.measures[clause.measure]
    change = measure.change
    limit = clause.limit / 100 if measure.unit == "rate" else clause.limit
    if change.n == 0 or not math.isfinite(change.value):
        sentence = f"{clause}: undecidable for {comparison.run}. No row has {measure.title}."
        return Finding(clause, comparison.run, "undecidable", sentence)
    outcome = outcome_of(change.low, change.high, clause.relation, limit)
    settle = pairs_to_settle if measure.base or measure.unit != "rate" else pairs_to_settle_rate
    needed = settle(change, limit) if outcome == "undecidable" else None
    return Finding(clause, comparison.run, outcome, _sentence(comparison, clause, outcome, needed), needed)


def outcome_of(low: float, high: float, relation: str, limit: float) -> Outcome:
    """Where an interval lies with regard to a limit, that which touches it being on the allowed side."""
    if relation == ">=":
        return "pass" if low >= limit else "fail" if high < limit else "undecidable"
    return "pass" if high <= limit else "fail" if low > limit else "undecidable"


def _sentence(comparison: Comparison, clause: Clause, outcome: Outcome, needed: int | None) -> str:
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


def fails(finding: Finding, undecided: str) -> bool:
    """Whether a finding fails the gate when undecidable clauses are to "pass" or to "fail"."""
    return finding.outcome == "fail" or (finding.outcome == "undecidable" and undecided == "fail")


def enforce(findings: Sequence[Finding], *, undecided: str = "fail") -> None:
    """Raise GateError with a sentence for each clause that does not hold."""
    failed = [finding.sentence for finding in findings if fails(finding, undecided)]
    if failed:
        raise GateError("\n".join(["The gate failed.", *map(visible, failed)]))


def github_annotations(findings: Iterable[Finding], *, undecided: str = "fail") -> list[str]:
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


def write_junit(path: Path, findings: Sequence[Finding], *, undecided: str = "fail") -> None:
    """Write the findings as a JUnit XML file, a test suite for each run and a test case for each clause."""
    from xml.etree import ElementTree as xml

    root = xml.Element("testsuites", name=GATE)
    for run in dict.fromkeys(finding.run for finding in findings):
        own = [finding for finding in findings if finding.run == run]
        failures = sum(fails(finding, undecided) for finding in own)
        suite = xml.SubElement(
            root,
            "testsuite",
            name=_printable(run),
            tests=str(len(own)),
            failures=str(failures),
            errors="0",
            skipped="0",
        )
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
