"""What company gains: python bench/claims/together.py -m MODEL PAIRS [--count 16] [--rounds 3].

Sixteen callers with one pair each, as threads and as coroutines on one judge, beside the same pairs one after the other.
One row of JSON: ratios of their times, median and middle half over the rounds. Contenders take turns in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from gramlite.bench.turns import Contender, ratio, summary, take_turns

from gramlite.judging.judge import Judge, Settings
from gramlite.judging.pair import Pair, Verdict
from gramlite.loading import load
from gramlite.runtime.options import RuntimeOptions
from gramlite.terminal import say_json


def one_by_one(judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
    return [judge(prompt=pair.prompt, response_a=pair.response_a, response_b=pair.response_b) for pair in pairs]


def in_threads(judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
    with ThreadPoolExecutor(max_workers=len(pairs)) as pool:
        return list(pool.map(lambda pair: one_by_one(judge, [pair])[0], pairs))


def in_coroutines(judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
    async def all_of_them() -> list[Verdict]:
        asked = (
            judge.aio(prompt=pair.prompt, response_a=pair.response_a, response_b=pair.response_b) for pair in pairs
        )
        return await asyncio.gather(*asked)

    return asyncio.run(all_of_them())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pairs", type=Path, help="pairs, JSONL")
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--count", type=int, default=16, help="callers, each with one pair")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=["think", "direct"], default="think")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rows = map(json.loads, options.pairs.read_text(encoding="utf-8").splitlines()[: options.count])
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in rows]
    runtime = RuntimeOptions(device="cpu", threads=options.threads)
    with load(options.model, settings=Settings(mode=options.mode), runtime=runtime) as judge:
        contenders = [
            Contender("one after the other", lambda each: one_by_one(judge, each)),
            Contender("threads", lambda each: in_threads(judge, each)),
            Contender("coroutines", lambda each: in_coroutines(judge, each)),
        ]
        take_turns(contenders, pairs, group=len(pairs), repetitions=options.rounds)
    say_json(
        {
            "pairs": len(pairs),
            "seconds a pair": {each.name: summary(each.seconds) for each in contenders},
            "ratios": [asdict(ratio(contenders[0], each)) for each in contenders[1:]],
        }
    )


if __name__ == "__main__":
    main()
