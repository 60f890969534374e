"""Interrupts a judging command at random moments and goes on with it, as often as asked; a program of its own.

    python tests/interrupts.py [--model FILE] [--rounds 300] [--seed 0] [--kinds judge,rank,bench,calibrate]

Without a model the scripted backend judges; the kinds `export` and `quantize` take a checkpoint for it. A round runs a
command, sends it SIGINT at a moment between the first sign of life and its end, and wants exit 130 within two seconds,
no traceback, and with `-o` the command to go on with, which then must end with exactly one row for each input, in
order; an artifact is there whole, with its manifest, or not at all. SIGINT goes to the process and its children, as a
terminal's Ctrl-C does. Moments are drawn evenly over how long the last whole run took; one that comes after the end is
drawn again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramlite.loading import open_artifact
from gramlite.storage import remove_path

# a process started in the background ignores SIGINT, and so do its children until they say otherwise
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "import sys; from gramlite import cli; run = cli.run\n"
    "cli.run = lambda arguments: print('begun', file=sys.stderr, flush=True) or run(arguments)\n"
    "cli.main(sys.argv[1:])"
)
FEW = 16
ROWS, LABELLED = 4, 20  # the least that calibrate takes
CHAT = Path(__file__).parents[1] / "gramlite/data/reference/hf/chat_template.jinja"
WITHOUT_VERDICT = 5
ARTIFACTS = {"export": ["export", "gguf"], "quantize": ["quantize", "gguf", "--type", "Q4_0"]}
PF_EXITING = 4  # among the flags in /proc/PID/stat


@dataclass(frozen=True)
class Command:
    """A command and, where it keeps rows, the file they come to, with how many belong there; or the artifact it makes."""

    words: list[str]
    output: Path | None = None
    rows: int = 0
    artifact: Path | None = None


@dataclass
class Ended:
    """How a process ended: its code, what it said, and the seconds from the signal to its end (None: it came late)."""

    code: int
    errors: str
    seconds: float | None


def scripted(folder: Path, seconds: float) -> Path:
    """A judge that needs no model and takes so long for a generation."""
    path = folder / "scripted.json"
    metadata = {"chat_template": CHAT.read_text(encoding="utf-8"), "template": {"name": "gramlite"}}
    path.write_text(json.dumps({"format": "scripted", "name": "s", "metadata": metadata, "seconds": seconds}))
    return path


def commands(folder: Path, model: str | None, kinds: list[str]) -> Iterator[Command]:
    """One after another: judge, rank, bench run and calibrate, think and direct, with and without an output."""
    texts = [{"prompt": f"Is {n} even?", "response_a": f"Yes, {n}.", "response_b": "No."} for n in range(LABELLED)]
    pairs = [{"id": str(n), **row, "label": "AB"[n % 2]} for n, row in enumerate(texts)]
    items = [{"id": str(n), "prompt": f"Is {n} even?", "completions": ["Yes.", f"No, {n}."]} for n in range(ROWS)]
    inputs: dict[str, list[Any]] = {"judge": pairs[:ROWS], "bench": pairs[:ROWS], "rank": items, "calibrate": pairs}
    for kind in inputs:
        text = "".join(json.dumps(row) + "\n" for row in inputs[kind])
        (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    number = 0
    while True:
        for kind in kinds:
            if kind in ARTIFACTS:
                number += 1
                yield Command(
                    [*ARTIFACTS[kind], str(model), "-o", str(folder / f"out{number}.gguf"), "--no-smoke"],
                    artifact=folder / f"out{number}.gguf",
                )
                continue
            for mode in ("think", "direct"):
                for keeps in (True, False):
                    number += 1
                    out = folder / f"out{number}"
                    options = ["--mode", mode, "--budget", "24", "--orders", "ab", "--context", "2048"]
                    options += ["-m", model] if model else []
                    words = ["bench", "run", "pairs:"] if kind == "bench" else [kind, ""]
                    words[-1] += str(folder / f"{kind}.jsonl")
                    rows = out / "rows.jsonl" if kind == "bench" else out
                    if keeps or kind == "bench":
                        yield Command([*words, *options, "-o", str(out)], rows, len(inputs[kind]))
                    else:
                        yield Command([*words, *options])


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_exiting(process: subprocess.Popen[str]) -> bool:
    """Whether a process has ended or is past its last act: the system takes its memory down, and drops signals."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return process.poll() is not None
    return bool(int(fields[6]) & PF_EXITING)


def interrupt(words: list[str], moment: float) -> tuple[Ended, float]:
    """Run a command and send it SIGINT so many seconds after its first line; also how long it ran in all."""
    process = start(words)
    assert process.stderr is not None
    first = process.stderr.readline()
    began = time.monotonic()
    try:
        process.wait(timeout=moment)
        late = True
    except subprocess.TimeoutExpired:
        late = is_exiting(process)
    sent = time.monotonic()
    if not late:
        os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        errors += "\nkilled: it did not end within a minute"
    ended = time.monotonic()
    return Ended(process.returncode, first + errors, None if late else ended - sent), ended - began


def faults(command: Command, ended: Ended, most: float) -> list[str]:
    """What is wrong with how an interrupted command ended, and with what going on with it comes to."""
    found = []
    if ended.code != 130:
        found.append(f"exit {ended.code}")
    if ended.seconds is not None and ended.seconds > most:
        found.append(f"{ended.seconds:.1f} s to its end")
    if "Traceback" in ended.errors or "ignored" in ended.errors:
        found.append("a traceback")
    if command.artifact:
        return found + torsos(command.artifact)
    if command.output is None:
        return found
    line = next((line for line in ended.errors.splitlines() if "--resume" in line), None)
    if line is None:
        return [*found, "no command to go on with"]
    words = shlex.split(line[line.index("gramlite ") :])[1:]
    with start(words) as going_on:
        try:
            _, errors = going_on.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            going_on.kill()
            return [*found, "going on does not end"]
    if going_on.returncode not in (0, WITHOUT_VERDICT):
        return [*found, f"going on ended with {going_on.returncode}: {errors[-300:]}"]
    rows = [json.loads(text)["id"] for text in command.output.read_text(encoding="utf-8").splitlines()]
    if rows != [str(n) for n in range(command.rows)]:
        found.append(f"rows {rows}")
    return found


def torsos(artifact: Path) -> list[str]:
    """What an interrupted command has left of an artifact that is not whole."""
    left = sorted(path.name for path in artifact.parent.glob(f"*{artifact.name}*"))
    if left == [artifact.name, f"{artifact.name}.json"]:
        open_artifact(artifact)
        left = []
    return [f"left {left}"] if left else []


def measure(model: str | None, rounds: int, seed: int, kinds: list[str], *, most: float = 2.0) -> list[str]:
    """The faults of so many rounds, each with what to run for it."""
    drawn, found = random.Random(seed), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judge = model if model is not None else str(scripted(folder, 0.02))
        coming = commands(folder, judge or None, kinds)
        whole: dict[str, float] = {}
        unknown = 60.0 if rounds > FEW else 2.0  # with many, let the first run of each kind end by itself
        for number in range(rounds):
            command = next(coming)
            kind = " ".join(word for word in command.words if "/" not in word)
            while True:
                moment = drawn.uniform(0, whole.get(kind, unknown))
                ended, seconds = interrupt(command.words, moment)
                if ended.seconds is not None:
                    break
                whole[kind] = max(seconds, 0.05)
                for leftover in folder.glob("out*"):
                    remove_path(leftover)
            for fault in faults(command, ended, most):
                found.append(f"round {number} at {moment:.3f} s: {fault}: {shlex.join(command.words)}\n{ended.errors}")
            print(f"\r{number + 1} of {rounds}, {len(found)} faults", end="", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="GGUF file; 'reference' is the reference judge.  [default: the scripted backend]"
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="judge,rank,bench,calibrate")
    options = parser.parse_args()
    model = "" if options.model == "reference" else options.model
    found = measure(model, options.rounds, options.seed, options.kinds.split(","))
    print("\n".join(found))
    print(
        f"{options.rounds - len({fault.split(' at ')[0] for fault in found})} of {options.rounds} rounds without a fault"
    )
    os._exit(bool(found))


if __name__ == "__main__":
    main()
