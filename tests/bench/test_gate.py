"""Gates: parsing, the three outcomes, and what CI systems are told."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from gramlite.bench.comparison import RunComparison, compare_runs
from gramlite.bench.folder import read_run
from gramlite.bench.gate import Clause, enforce, evaluate, github_annotations, outcome_of, parse_gate, write_junit

from gramlite.errors import GateError, InputError

from .conftest import MakeRun, judged_row


def comparison(make_run: MakeRun, lost: int, gained: int, n: int) -> RunComparison:
    def rows(verdicts: list[bool]) -> list[dict[str, object]]:
        return [judged_row(str(i), [1.0 if right else -1.0] * 2, label="A") for i, right in enumerate(verdicts)]

    base = [True] * (n - gained) + [False] * gained
    run = [False] * lost + [True] * (n - lost)
    return compare_runs(read_run(make_run("base", rows(base))), read_run(make_run("run%,:\n", rows(run))))


def test_clauses_are_read() -> None:
    assert parse_gate("accuracy>=-1.0, flips <= 3 %,consistency>=-2") == [
        Clause("accuracy", ">=", -1.0), Clause("flips", "<=", 3.0), Clause("consistency", ">=", -2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy>-1", "quality>=3", "flips<=three", "flips<=3,,", "flips==3"]
)
def test_what_is_no_clause_is_refused_with_the_measures(text: str) -> None:
    with pytest.raises(InputError, match=r"accuracy>=-1\.0.*measures are: accuracy, flips"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("low", "high", "relation", "limit", "outcome"),
    [
        (-0.005, 0.01, ">=", -0.01, "pass"), (-0.01, 0.01, ">=", -0.01, "pass"), (-0.02, 0.01, ">=", -0.01, "undecidable"),
        (-0.05, -0.02, ">=", -0.01, "fail"), (0.0, 0.03, "<=", 0.03, "pass"), (0.01, 0.04, "<=", 0.03, "undecidable"),
        (0.031, 0.05, "<=", 0.03, "fail"),
    ],
)  # fmt: skip
def test_the_bound_decides_and_not_the_point(
    low: float, high: float, relation: str, limit: float, outcome: str
) -> None:
    assert outcome_of(low, high, relation, limit) == outcome


def test_pass(make_run: MakeRun) -> None:
    findings = evaluate(comparison(make_run, 4, 4, 2000), parse_gate("accuracy>=-1.0,flips<=3,consistency>=-2"))
    assert [finding.outcome for finding in findings] == ["pass"] * 3
    enforce(findings)
    assert "accuracy>=-1: pass" in findings[0].sentence and "95 % interval" in findings[0].sentence


def test_fail_says_a_sentence_for_each_clause(make_run: MakeRun) -> None:
    findings = evaluate(comparison(make_run, 200, 0, 1000), parse_gate("accuracy>=-1.0,flips<=3,gained<=1"))
    assert [finding.outcome for finding in findings] == ["fail", "fail", "pass"]
    with pytest.raises(GateError) as caught:
        enforce(findings)
    assert caught.value.exit_code == 7
    message = str(caught.value)
    assert message.count("fail for") == 2 and "gained" not in message
    assert "Accuracy: -20.0 points" in message and "Verdicts changed: 20.0 %" in message


def test_too_few_pairs_are_undecidable_and_say_how_many_are_needed(make_run: MakeRun) -> None:
    findings = evaluate(comparison(make_run, 1, 1, 60), parse_gate("accuracy>=-1.0,flips<=4"))
    assert [finding.outcome for finding in findings] == ["undecidable"] * 2
    for finding in findings:
        assert finding.pairs_needed is not None and finding.pairs_needed > 60
        assert f"about {finding.pairs_needed:,} pairs would settle it" in finding.sentence
    with pytest.raises(GateError):
        enforce(findings)
    with pytest.raises(GateError):
        enforce(findings, undecided="fail")
    enforce(findings, undecided="pass")


def test_identical_runs_of_ten_pairs_do_not_pass(make_run: MakeRun) -> None:
    findings = evaluate(comparison(make_run, 0, 0, 10), parse_gate("accuracy>=-1.0,flips<=3"))
    assert [finding.outcome for finding in findings] == ["undecidable"] * 2


def test_a_measure_that_is_not_there_is_undecidable(make_run: MakeRun) -> None:
    found = comparison(make_run, 0, 0, 10)
    missing = type(found.measures["seconds"].change)(math.nan, math.nan, math.nan, 0)
    measures = {**found.measures, "seconds": type(found.measures["seconds"])("seconds", "seconds a pair", missing)}
    [finding] = evaluate(type(found)(**{**found.__dict__, "measures": measures}), parse_gate("seconds<=1"))
    assert finding.outcome == "undecidable" and "No row has seconds a pair" in finding.sentence


def test_github_annotations_are_escaped(make_run: MakeRun) -> None:
    findings = evaluate(comparison(make_run, 60, 0, 1000), parse_gate("accuracy>=-1.0,gained<=1,flips<=6"))
    lines = github_annotations(findings)
    assert [line.split(" ")[0] for line in lines] == ["::error", "::notice", "::error"]
    assert github_annotations(findings, undecided="pass")[2].startswith("::warning")
    for line in lines:
        assert "\n" not in line and "%0A" in line  # the run's name has a line break in it
        assert line.count("::") == 2
        assert "run%25,:%0A" in line


def test_junit_is_valid_and_counts_failures(make_run: MakeRun, tmp_path: Path) -> None:
    found = comparison(make_run, 60, 0, 1000)
    odd = type(found)(**{**found.__dict__, "run": "bad\x00name <&>"})
    findings = evaluate(odd, parse_gate("accuracy>=-1.0,gained<=1,flips<=6"))
    write_junit(tmp_path / "a.xml", findings)
    write_junit(tmp_path / "b.xml", findings, undecided="pass")
    for name, failures in (("a.xml", 2), ("b.xml", 1)):
        suite = ElementTree.parse(tmp_path / name).getroot()[0]
        assert suite.attrib["name"] == "bad\ufffdname <&>"
        assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", str(failures))
        assert len(suite.findall("testcase/failure")) == failures
        assert [case.attrib["name"] for case in suite] == ["accuracy>=-1", "gained<=1", "flips<=6"]
