"""What was opened before a fork is refused after it, at once and in words; a judge opened after it works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forked import check_child, fork_with


@pytest.mark.fault("fork")
@pytest.mark.parametrize("words", [(), ("busy",)])
def test_every_use_in_a_forked_child_is_an_error(scripted: Path, words: tuple[str, ...]) -> None:
    check_child(fork_with(scripted, *words))


@pytest.mark.fault("fork")
def test_a_child_is_refused_while_llama_cpp_computes_in_its_parent(reference_q8: Path) -> None:
    check_child(fork_with(reference_q8, "busy"))


POOL = """
import multiprocessing, sys, gramlite
settings = gramlite.Settings(mode="direct", orders="ab")
texts = dict(prompt="q", response_a="x", response_b="y")

def use(number):
    try:
        return judge(**texts).p_a
    except gramlite.GramliteError as error:
        return str(error)

def load(threads):
    runtime = gramlite.RuntimeOptions(threads=threads)
    try:
        with gramlite.load(sys.argv[1], settings=settings, runtime=runtime) as own:
            return own(**texts).p_a
    except gramlite.GramliteError as error:
        return type(error).__name__ + ": " + str(error)

judge = gramlite.load(sys.argv[1], settings=settings)
if "used" in sys.argv:
    judge(**texts)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print([use(0), *pool.map_async(use, range(3)).get(60), *pool.map_async(load, [None, 1, 2]).get(60)])
"""


@pytest.mark.fault("fork")
@pytest.mark.parametrize("used", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_child_loads_a_judge_of_its_own(reference_q8: Path, used: bool) -> None:
    """Once the parent has computed, OpenMP gives its children one thread each."""
    command = [sys.executable, "-c", POOL, str(reference_q8), "used" if used else "unused"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stderr
    here, *refused, alone, one, two = eval(finished.stdout)
    assert all("before the process was forked" in said for said in refused)
    assert one == alone == here
    if used:
        assert two.startswith("ResourceError: This process cannot compute with 2 threads")
        assert "one thread in this process" in finished.stderr
    else:
        assert two == here and "thread" not in finished.stderr
