"""Ctrl-C at any moment: exit 130 in time, no traceback, and a run that goes on to one row for each input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupts import measure

KINDS = ["judge", "rank", "bench", "calibrate"]
NOISE = 8.0  # a busy machine may take so long to do what takes two seconds otherwise


def test_half_a_dozen_random_moments() -> None:
    assert measure(None, 6, 0, KINDS, most=NOISE) == []


@pytest.mark.slow
def test_three_hundred_random_moments() -> None:
    assert measure(None, 300, 1, KINDS, most=NOISE) == []


@pytest.mark.fault("interrupt")
def test_moments_of_a_gguf_judge(reference_q8: Path) -> None:
    """Most of a run that short is loading."""
    assert measure(str(reference_q8), 2, 2, ["judge"], most=NOISE) == []


@pytest.mark.slow
@pytest.mark.fault("interrupt")
def test_fifty_random_moments_of_a_gguf_judge(reference_q8: Path) -> None:
    assert measure(str(reference_q8), 50, 3, KINDS, most=NOISE) == []


@pytest.mark.slow
def test_random_moments_of_export_and_quantize(tmp_path: Path) -> None:
    from gramlite.reference.files import build_checkpoint

    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    assert measure(str(checkpoint), 20, 4, ["export", "quantize"], most=NOISE) == []


def ended_by_sigint(code: str, *arguments: object, group: bool = False, again: bool = False) -> tuple[int, str, float]:
    """Exit code, standard error and seconds of a process that is sent SIGINT once it says `ready` on standard output."""
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", listening + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            break
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT) if group else process.send_signal(signal.SIGINT)
    if again:
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors, time.monotonic() - began


COMMAND = """
import os, sys, time
import click
from gramlite import cli
def ready(): print("ready", flush=True)
@cli.command.command("probe")
def probe():
{body}
cli.main(["probe"])
"""


def program(body: str) -> str:
    """A command line whose work is `body`."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return COMMAND.format(body=indented)


STUCK = {
    "a native call that does not come back": """
import ctypes
lock = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(lock)
ready()
ctypes.CDLL(None).pthread_mutex_lock(lock)
""",
    "a library that swallows it": """
while True:
    try:
        ready()
        time.sleep(30)
    except BaseException:
        pass
""",
    "a destructor that loses it": """
class Lost:
    def __del__(self):
        ready()
        time.sleep(30)
lost = Lost()
del lost
time.sleep(30)
""",
    "an error that it has led to": """
try:
    ready()
    time.sleep(30)
except KeyboardInterrupt:
    raise ValueError("a consequence")
""",
    "an end that it does not keep from coming": """
try:
    ready()
    time.sleep(30)
except KeyboardInterrupt:
    return 0
""",
}


@pytest.mark.fault("interrupt")
@pytest.mark.parametrize("body", STUCK.values(), ids=STUCK.keys())
def test_it_is_not_lost(body: str) -> None:
    code, errors, seconds = ended_by_sigint(program(body))
    assert code == 130 and seconds < NOISE
    assert errors.strip() == "Interrupted."


@pytest.mark.fault("interrupt")
def test_it_counts_until_the_process_is_gone() -> None:
    """What is done at exit comes after the last row, and before the exit code."""
    body = "import atexit; atexit.register(lambda: (ready(), time.sleep(1)))"
    code, errors, _ = ended_by_sigint(program(body))
    assert code == 130 and errors == "Interrupted.\n"


def test_a_second_one_ends_the_process_at_once() -> None:
    body = """
try:
    ready()
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(30)
"""
    started = time.monotonic()
    code, errors, _ = ended_by_sigint(program(body), again=True)
    assert code == 130 and errors.strip() == "Interrupted." and time.monotonic() - started < 30


@pytest.mark.fault("interrupt")
def test_ending_by_force_leaves_no_temporary_file_and_no_child(tmp_path: Path) -> None:
    body = """
import subprocess
from pathlib import Path
from gramlite.storage import atomic_output
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"])
with atomic_output(Path(sys.argv[1]) / "folder") as folder, atomic_output(Path(sys.argv[1]) / "file") as file:
    folder.mkdir()
    (folder / "half").write_text("half")
    file.write_text("half")
    Path(sys.argv[1], "pid").write_text(str(child.pid))
    while True:
        try:
            ready()
            time.sleep(30)
        except KeyboardInterrupt:
            pass
"""
    code, errors, _ = ended_by_sigint(program(body), tmp_path)
    assert code == 130 and errors == "Interrupted.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    deadline = time.monotonic() + 10
    while child.exists() and "zombie" not in child.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "zombie" in child.read_text()


def test_a_process_that_ignores_it_goes_on_ignoring_it() -> None:
    body = "ready()\ntime.sleep(0.5)\nreturn 0"
    code, errors, _ = ended_by_sigint("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + program(body))
    assert code == 0 and errors == ""


# --- held back while native code may call back ------------------------------------------------------------------


def raised(act: Callable[[], None]) -> bool:
    try:
        act()
    except KeyboardInterrupt:
        return True
    return False


def test_it_is_held_back_until_the_end_of_a_block() -> None:
    from gramlite.interrupt import uninterrupted

    seen: list[str] = []

    def act() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("after the signal")
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            seen.append("after the inner block")
        seen.append("never")

    before = signal.getsignal(signal.SIGINT)
    assert raised(act) and seen == ["after the signal", "after the inner block"]
    assert signal.getsignal(signal.SIGINT) is before
    assert not raised(lambda: uninterrupted()(seen.clear)()) and seen == []


def test_it_is_raised_over_what_a_block_raises() -> None:
    from gramlite.interrupt import uninterrupted

    @uninterrupted()
    def act() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError("llama.cpp was aborted")

    assert raised(act)


def test_other_threads_hold_nothing_back() -> None:
    from gramlite.interrupt import uninterrupted

    done: list[bool] = []

    def act() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT) is before)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.fault("interrupt")
def test_a_log_callback_of_llama_cpp_does_not_lose_it(reference_q8: Path) -> None:
    """In a library, too: there Python's own handler raises it wherever it runs."""
    code = """
import signal, sys, gramlite
from gramlite.backends.gguf import library
heard = []
def keep(text):
    if not heard:
        heard.append(text)
        signal.raise_signal(signal.SIGINT)
library._log_tail = type("Tail", (list,), {"append": lambda self, text: keep(text)})()
try:
    gramlite.load(sys.argv[1])
except KeyboardInterrupt:
    print("raised", len(heard))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code, str(reference_q8)], capture_output=True, text=True, timeout=120
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "raised 1\n", "")
