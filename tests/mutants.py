"""Random mutants of the code that reads, matches and scores, each run against the tests of its part.

    python tests/mutants.py [--count 300] [--seed 0] [--workers 2] [--only gramlite/rows/journal.py ...]

The operators are cosmic-ray's (https://cosmic-ray.readthedocs.io): comparisons, arithmetic, conditions, constants; and one
of our own for what a function returns. A mutant is drawn by its place first and by its operator then. One that no test
notices is printed as a patch. Needs `pip install cosmic-ray`; works on the last commit, in folders of its own.
"""

from __future__ import annotations

import argparse
import difflib
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from compare_versions import HERE, check_out
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

KINDS = {
    "comparison": ("ReplaceComparisonOperator_",),
    "arithmetic": tuple(
        f"ReplaceBinaryOperator_{name}_" for name in ("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow")
    ),
    "condition": ("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceUnaryOperator_Delete_Not"),
    "constant": ("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceUnaryOperator_USub_UAdd"),
}
PARTS: dict[str, Sequence[str]] = {  # the likeliest to notice come first, for the first failure ends a run
    "gramlite/rows/labels.py": ("tests/rows/test_labels.py",),
    "gramlite/rows/conversations.py": (
        "tests/rows/test_conversations_refused.py",
        "tests/rows/test_conversations.py",
        "tests/rows/test_messages.py",
        "tests/rows/test_completions.py",
        "tests/rows/test_shapes.py",
    ),
    "gramlite/rows/shapes.py": (
        "tests/rows/test_rows.py",
        "tests/rows/test_conversations_refused.py",
        "tests/rows/test_conversations.py",
        "tests/rows/test_messages.py",
        "tests/rows/test_ids.py",
        "tests/rows/test_shapes.py",
        "tests/rows/test_completions.py",
        "tests/rows/test_labels.py",
        "tests/rows/test_files.py",
    ),
    "gramlite/rows/lines.py": ("tests/rows/test_rows.py", "tests/rows/test_ids.py", "tests/rows/test_labels.py"),
    "gramlite/rows/files.py": ("tests/rows/test_files.py", "tests/rows/test_ids.py"),
    "gramlite/judging/delimiters.py": ("tests/judging/test_delimiters.py", "tests/generation/test_prompt.py"),
    "gramlite/judging/confidence.py": ("tests/judging/test_confidence.py", "tests/commands/test_calibrate.py"),
    "gramlite/rows/judged_run.py": ("tests/rows/test_judged_run.py", "tests/commands/test_limit.py"),
    "gramlite/rows/journal.py": ("tests/rows/test_journal.py", "tests/test_outputs.py"),
    **dict.fromkeys(
        ("bench/scoring.py", "bench/records.py", "bench/suites/*.py"),
        ("tests/bench/test_suites.py", "tests/bench/test_official_scores.py", "tests/bench/test_suite_labels.py"),
    ),
}
TIME_LIMIT = 300  # seconds; a mutant that takes longer is counted as noticed


class ReturnNone(Operator):  # type: ignore[misc]
    """`return x` becomes `return`."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        del node.children[1:]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


Mutant = tuple[str, str, Operator, int]  # file, kind, operator, occurrence


def candidates(file: str, code: str) -> dict[tuple[str, Any], list[Mutant]]:
    """Every mutant of a file, by its kind and place."""
    found: dict[tuple[str, Any], list[Mutant]] = defaultdict(list)
    operators = [("return", ReturnNone())]
    for kind, prefixes in KINDS.items():
        names = [name for name in operator_names() if name.removeprefix("core/").startswith(prefixes)]
        operators += [(kind, get_operator(name)()) for name in names]
    tree = get_ast(code)
    for kind, operator in operators:
        occurrence = 0
        for node in ast_nodes(tree):
            for position in operator.mutation_positions(node):
                found[kind, position].append((file, kind, operator, occurrence))
                occurrence += 1
    return found


def draw(count: int, seed: int, only: Sequence[str]) -> list[Mutant]:
    """So many mutants, each place at most once."""
    places = []
    for pattern in PARTS:
        for path in sorted(HERE.parent.glob(pattern)):
            file = str(path.relative_to(HERE.parent))
            if not only or file in only:
                places += [mutants for _, mutants in sorted(candidates(file, path.read_text()).items(), key=str)]
    chosen = random.Random(seed)
    return [chosen.choice(mutants) for mutants in chosen.sample(places, min(count, len(places)))]


def tests_of(file: str) -> list[str]:
    tests = next(tests for pattern, tests in PARTS.items() if Path(file).match(pattern))
    return [test for test in tests if (HERE.parent / test).exists()]


def noticed(folder: Path, tests: Sequence[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return (
            subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=TIME_LIMIT).returncode
            != 0
        )
    except subprocess.TimeoutExpired:
        return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    drawn = draw(options.count, options.seed, options.only)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        if (HERE.parents[1] / "shared").is_dir():
            (base / "shared").symlink_to(HERE.parents[1] / "shared")
        folders: Queue[Path] = Queue()
        for number in range(options.workers):
            check_out("HEAD", base / str(number))
            folders.put(base / str(number))

        def try_one(mutant: Mutant) -> tuple[Mutant, bool, str]:
            file, _, operator, occurrence = mutant
            folder = folders.get()
            path = folder / file
            code = path.read_text()
            changed = mutate_code(code, operator, occurrence)
            try:
                path.write_text(changed)
                patch = "".join(difflib.unified_diff(code.splitlines(True), changed.splitlines(True), file, file, n=1))
                return mutant, noticed(folder, tests_of(file)), patch
            finally:
                path.write_text(code)
                folders.put(folder)

        try:
            for file in sorted({file for file, *_ in drawn}):
                if noticed(base / "0", tests_of(file)):
                    print(f"The tests of {file} do not pass as they are.")
                    return 1
            with ThreadPoolExecutor(options.workers) as pool:
                outcomes = []
                for outcome in pool.map(try_one, drawn):
                    outcomes.append(outcome)
                    if not outcome[1]:
                        print(outcome[2], flush=True)
        finally:
            for number in range(options.workers):
                subprocess.run(
                    ["git", "worktree", "remove", "--force", base / str(number)], cwd=HERE, capture_output=True
                )
    counts: Counter[tuple[str, bool]] = Counter()
    for (file, kind, *_), killed, _ in outcomes:
        counts.update({(file, killed): 1, (kind, killed): 1, ("all", killed): 1})
    for name in sorted({name for name, _ in counts}):
        killed = counts[name, True]
        total = killed + counts[name, False]
        print(f"{name:<36} {killed:>4} of {total:>4} noticed, {killed / total:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
