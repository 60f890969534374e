"""Opens a judge, forks, and tries every use of it in the child; a program, because a fork must not take pytest along.

    python tests/forked.py MODEL [busy]

With `busy` another thread is judging at the moment of the fork, and holds what it locks. Prints a JSON object: what each
use raised and after how many seconds, how the child ended, and whether the parent's verdicts are the same afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gramlite
from gramlite import Pair, Settings
from gramlite.integrations.trl import win_rate_reward
from gramlite.judging.judge import Judge

TEXTS = {"prompt": "Is rye a grass?", "response_a": "Yes, it is.", "response_b": "No."}
SECONDS = 60


def pairs(count: int) -> Iterator[Pair]:
    return (Pair(f"Is {number} even?", "Yes.", "No.") for number in range(count))


def uses(judge: Judge, begun: Iterator[Any], fresh: Iterator[Any]) -> dict[str, Callable[[], Any]]:
    return {
        "call": lambda: judge(**TEXTS),
        "many": lambda: list(judge.many(pairs(2))),
        "iterator begun before": lambda: next(begun),
        "iterator made before": lambda: next(fresh),
        "rank": lambda: judge.rank(prompt="q", completions=["x", "y", "z"]),
        "with_settings": lambda: judge.with_settings(seed=1),
        "with_adapter": lambda: judge.with_adapter(None),
        "grouped": judge.grouped,
        "abort": judge.abort,
        "reward": lambda: win_rate_reward(judge)(["q", "q"], ["x", "y"]),
        "backend.step": lambda: judge.backend.step(0),
        "backend.vocabulary": lambda: judge.backend.vocabulary.encode("x"),
        "backend.device": lambda: judge.backend.device,
    }


def child(out: int, judge: Judge, begun: Iterator[Any], fresh: Iterator[Any]) -> None:
    seen = {}
    signal.alarm(SECONDS)  # a use that hangs ends the child
    for name, use in uses(judge, begun, fresh).items():
        began = time.monotonic()
        try:
            use()
            raised = "nothing"
        except gramlite.GramliteError as error:
            raised = str(error)
        except Exception as error:
            raised = repr(error)
        seen[name] = [raised, time.monotonic() - began]
    began = time.monotonic()
    judge.close()
    with judge:
        pass
    seen["close"] = ["", time.monotonic() - began]
    os.write(out, json.dumps(seen).encode())
    sys.exit(7)  # through Python's own end, where what is left is freed


def main(model: str | None, busy: bool) -> None:
    judge = gramlite.load(model, settings=Settings(mode="direct", orders="ab"))
    before = judge(**TEXTS).p_a
    if busy:
        begun, fresh = judge.many(pairs(4)), judge.many(pairs(2))
        handed: list[Any] = []

        def work() -> None:
            for verdict in judge.many(pairs(6)):
                handed.append(verdict)

        thread = threading.Thread(target=work)
        thread.start()
        while not handed:
            time.sleep(0.001)
    else:
        begun, fresh = judge.many(pairs(4)), judge.many(pairs(2))
        next(begun)
    receiver, sender = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if not process:
        child(sender, judge, begun, fresh)
    os.close(sender)
    seen = b"".join(iter(lambda: os.read(receiver, 65536), b""))
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(process, signal.SIGKILL)
    if busy:
        thread.join()
    assert len(list(begun)) == (4 if busy else 3)
    after = judge(**TEXTS).p_a
    judge.close()
    code = os.waitstatus_to_exitcode(ended[1]) if ended[0] else "hangs"
    print(json.dumps({"uses": json.loads(seen or b"{}"), "child": code, "same": before == after}))


def fork_with(model: Path, *words: str) -> dict[str, Any]:
    """What the program saw; nothing but that is said, not even while Python ends."""
    command = [sys.executable, __file__, str(model), *words]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0 and finished.stderr == "", finished.stderr
    seen: dict[str, Any] = json.loads(finished.stdout)
    return seen


def check_child(seen: dict[str, Any]) -> None:
    assert len(seen["uses"]) == 14, "a use hung"
    for name, (raised, seconds) in seen["uses"].items():
        assert seconds < 1, f"{name} took {seconds} s"
        assert name == "close" or "before the process was forked" in raised, f"{name} raised {raised}"
    assert seen["child"] == 7, "the child ends with its own code"
    assert seen["same"], "the parent goes on as before"


if __name__ == "__main__":
    main(sys.argv[1] or None, "busy" in sys.argv)
