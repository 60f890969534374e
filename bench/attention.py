"""Plain against flash attention on the CPU: python -m gramlite.bench.attention -m MODEL.

Reads a prompt, lets 1 to 16 sequences share it, and takes steps with all of them together, each of its own tokens.
One row of JSON for each number of sequences: milliseconds a step of both, taken in turns, median and middle half, and
how many times longer flash attention takes; a first row has the same for reading the prompt. `PLAIN_ATTENTION` in
gramlite/device.py, the number of sequences from which on the judge takes plain attention, comes from here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from gramlite.backends.gguf_context import LlamaContext
from gramlite.device import Layout, Offload, thread_count

from .turns import summary

BATCH = 500  # tokens of a prompt read at once


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens that the sequences share")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=10, help="steps of both for each number of sequences")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    most = max(options.sequences)
    cells = options.prompt + most * options.steps * len(options.sequences) + BATCH
    contexts = {
        name: LlamaContext(
            options.model,
            Offload(0, cells, "cpu", Layout(most, flash_attention=flash)),
            threads=thread_count(options.threads),
        )
        for name, flash in (("plain", False), ("flash", True))
    }
    tokens = [int(token) for token in np.random.default_rng(0).integers(100, 10_000, options.prompt)]
    seconds = {name: [read(context, tokens) for _ in range(3)] for name, context in contexts.items()}
    say("prompt", options.prompt, seconds)
    for sequences in options.sequences:
        for context in contexts.values():
            for sequence in range(1, most + 1):
                context.cut(sequence, 0)
                context.share(0, sequence, options.prompt)
        seconds = {name: [] for name in contexts}
        for number in range(options.steps + 1):
            for name, context in contexts.items():
                took = step(context, tokens[: sequences + number], sequences, options.prompt + number)
                if number:  # the first one warms up
                    seconds[name].append(took)
        say("sequences", sequences, seconds)
    for context in contexts.values():
        context.close()


def read(context: LlamaContext, tokens: list[int]) -> float:
    """Compute a prompt in the trunk; returns the seconds."""
    context.cut(0, 0)
    began = time.perf_counter()
    for start in range(0, len(tokens), BATCH):
        context.begin()
        context.add(tokens[start : start + BATCH], [0], start)
        context.want(context.filled - 1)
        context.decode()
    context.logits(context.filled - 1)
    return time.perf_counter() - began


def step(context: LlamaContext, tokens: list[int], sequences: int, position: int) -> float:
    """One token for each of the sequences; returns the seconds."""
    began = time.perf_counter()
    context.begin()
    for sequence in range(1, sequences + 1):
        context.add([tokens[-sequence]], [sequence], position)
        context.want(context.filled - 1)
    context.decode()
    context.logits(0)
    return time.perf_counter() - began


def say(what: str, count: int, seconds: dict[str, list[float]]) -> None:
    row: dict[str, Any] = {what: count}
    for name, each in seconds.items():
        row[f"{name}_ms"] = {key: round(1000 * value, 1) for key, value in summary(each).items()}
    row["flash_over_plain"] = round(summary(seconds["flash"])["median"] / summary(seconds["plain"])["median"], 2)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
