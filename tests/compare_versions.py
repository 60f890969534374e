"""Runs the tests of known faults against an earlier version and this one, and prints what fails before and passes after.

    python tests/compare_versions.py REVISION [NAME ...] [-- PYTEST OPTIONS]

REVISION is the commit before the faults were mended; NAMEs are those of `@pytest.mark.fault(NAME)`, all by default. Both
versions are checked out beside one another, and get the tests of this one. A test may have many cases, some of which held
before. Exit code 1 where no case of a test fails before, or one does not pass after.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAPPED = ("export", "quant", "bench")
COLUMNS = "{:<16} {:>6} {:>13} {:>6} {:>14} {:>13}"
Results = dict[tuple[str, str], str]


def check_out(revision: str, folder: Path) -> None:
    """Lay out a revision with this version's tests, importable as `gramlite` from its own folder."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, revision], cwd=HERE, check=True)
    shutil.rmtree(folder / "tests")
    shutil.copytree(HERE, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE.parent / "pyproject.toml", folder)
    for name in MAPPED:
        (folder / "gramlite" / name).symlink_to(Path("..") / name)


def results(folder: Path, options: list[str]) -> Results:
    """Passed, failed or skipped, by the fault's name and the test's."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "fault and not slow", f"--junitxml={report}", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        names = [item.get("value", "") for item in case.iter("property") if item.get("name") == "fault"]
        outcome = "passed"
        for kind in ("failure", "error", "skipped"):
            if case.find(kind) is not None:
                outcome = kind
        for name in names:
            found[name, f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    revision, *names = arguments[:split]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        if (HERE.parents[1] / "shared").is_dir():
            (base / "shared").symlink_to(HERE.parents[1] / "shared")
        try:
            outcomes = []
            for label, commit in (("before", revision), ("after", "HEAD")):
                check_out(commit, base / label)
                outcomes.append(results(base / label, arguments[split + 1 :]))
        finally:
            for label in ("before", "after"):
                subprocess.run(["git", "worktree", "remove", "--force", base / label], cwd=HERE, capture_output=True)
    wrong = table(*outcomes, names)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def table(before: Results, after: Results, names: Sequence[str] = ()) -> list[str]:
    """Print a row a fault; returns what is not as it should be."""
    print(COLUMNS.format("fault", "tests", "that failed", "cases", "failed before", "passed after"))
    wrong = []
    for name in sorted({name for name, _ in after if not names or name in names}):
        cases = [key for key in after if key[0] == name]
        failed = [key for key in cases if before.get(key) in (None, "failure", "error")]  # None: it cannot be collected
        passed = [key for key in cases if after[key] == "passed"]
        tests, bite = ({case.partition("[")[0] for _, case in keys} for keys in (cases, failed))
        print(COLUMNS.format(name, len(tests), len(bite), len(cases), len(failed), len(passed)))
        wrong += [f"{name}: {test} passes before" for test in sorted(tests - bite)]
        wrong += [f"{name}: {case} after: {after[name, case]}" for _, case in sorted({*cases} - {*passed})]
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
