"""What voting and ranking take beside the plain way: python bench/claims/uses.py voting|ranking -m MODEL PAIRS.

voting    eight rationales for each order of a pair: every one (`--all-votes`), with early stop, and asked for one by
          one with llama-cpp-python's create_chat_completion, which keeps the prompt's beginning computed by itself.
ranking   all pairs of a prompt's responses in both orders, in direct mode: `rank --method full`, and each judged alone
          without anything kept of what was computed before.

One row of JSON a group of pairs or prompts, with the seconds that each contender took for one of them, and a last one with
the ratios: median and middle half over the rows. Contenders take turns in one process, which of them begins changes from row
to row. Voting judges pairs in groups as `gramlite judge` does a file; with `--group 1` each pair is over before the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gramlite.bench.neighbours import both_orders, question
from gramlite.bench.turns import Contender, ratio, take_turns

from gramlite.generation.request import Request
from gramlite.judging.judge import Judge, Settings
from gramlite.judging.pair import Pair
from gramlite.loading import load
from gramlite.runtime.machine import thread_count
from gramlite.runtime.options import RuntimeOptions
from gramlite.terminal import say_json

SPREAD = 4  # rows, under which a ratio has no middle half


class WithoutReuse:
    """A backend that computes every prompt from its first token."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def start(self, request: Request) -> bool:
        started: bool = self._backend.start(replace(request, splits=()))
        return started


def voting_contest(model: Path, *, votes: int, threads: int | None, tokens: int) -> list[Contender]:
    """The judge with and without early stop, and as many chat completions a prompt as there are votes."""
    import llama_cpp

    runtime = RuntimeOptions(device="cpu", threads=threads)
    settings = Settings(votes=votes, budget=tokens, early_stop=False)
    judge = load(model, settings=settings, runtime=runtime)
    early = judge.with_settings(early_stop=True)
    llama = llama_cpp.Llama(
        str(model), n_ctx=4096, n_threads=thread_count(threads), n_threads_batch=thread_count(threads), verbose=False
    )

    def chat(pair: Pair, swap: bool) -> object:
        messages = [{"role": "user", "content": question(judge, pair, swap)}]
        return [
            llama.create_chat_completion(messages, max_tokens=tokens, temperature=0.75, seed=seed)
            for seed in range(votes)
        ]

    return [
        Contender("gramlite, early stop", lambda pairs: _judge(early, pairs)),
        Contender("gramlite, all votes", lambda pairs: _judge(judge, pairs)),
        Contender("create_chat_completion", both_orders(chat)),
    ]


def ranking_contest(model: Path, *, threads: int | None) -> list[Contender]:
    """A ranking by all pairs, and the same pairs judged alone; a `Pair` here holds responses as JSON in response_a."""
    judge = load(model, settings=Settings(mode="direct"), runtime=RuntimeOptions(device="cpu", threads=threads))
    alone = Judge(WithoutReuse(judge.backend), judge.template, judge.scaffold, judge.settings, judge.model)

    def rank(pairs: Sequence[Pair]) -> object:
        return [judge.rank(prompt=pair.prompt, completions=_responses(pair), method="full") for pair in pairs]

    def one_by_one(pairs: Sequence[Pair]) -> object:
        return [
            alone(prompt=pair.prompt, response_a=first, response_b=second)
            for pair in pairs
            for first, second in itertools.combinations(_responses(pair), 2)
        ]

    return [Contender("rank --method full", rank), Contender("one by one", one_by_one)]


def ranking_tasks(rows: Sequence[Pair], count: int, limit: int) -> list[Pair]:
    """`limit` prompts of middling length, each with `count` responses like its own in length, from all the rows."""
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    middle = ordered[max(0, len(ordered) // 2 - limit) :][:limit]
    responses = sorted((row.response_a for row in rows), key=len)
    tasks = []
    for row in middle:
        start = min(sum(len(text) < len(row.response_a) for text in responses), len(responses) - count)
        tasks.append(Pair(row.prompt, json.dumps(responses[start : start + count]), "-"))
    return tasks


def _responses(task: Pair) -> list[str]:
    return [str(text) for text in json.loads(task.response_a)]


def _judge(judge: Judge, pairs: Sequence[Pair]) -> list[object]:
    return list(judge.many(pairs))


def measure(
    contenders: Sequence[Contender], tasks: Sequence[Pair], group: int, say: Callable[[dict[str, Any]], None]
) -> None:
    """Let the contenders take turns on each group of tasks, after a warm-up on the first one, and say what each took."""

    def tick() -> None:
        done = {len(each.seconds) for each in contenders}
        if len(done) == 1 and (rounds := done.pop()):
            say({"group": rounds - 1, "seconds": {each.name: round(each.seconds[-1], 2) for each in contenders}})

    take_turns(contenders, tasks, group=group, repetitions=1, tick=tick)
    if len(contenders[0].seconds) >= SPREAD:
        say({"ratios": [asdict(ratio(contenders[-1], each)) for each in contenders[:-1]]})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("use", choices=["voting", "ranking"])
    parser.add_argument("pairs", type=Path, help="pairs, JSONL")
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="pairs, or prompts to rank responses for")
    parser.add_argument("--votes", type=int, default=8)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="most tokens of a rationale")
    parser.add_argument("--group", type=int, default=4, help="pairs that are voted on in one go")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rows = [
        Pair(row["prompt"], row["response_a"], row["response_b"])
        for row in map(json.loads, options.pairs.read_text(encoding="utf-8").splitlines())
    ]
    if options.use == "voting":
        contest = voting_contest(options.model, votes=options.votes, threads=options.threads, tokens=options.tokens)
        tasks = rows[: options.limit]
    else:
        contest = ranking_contest(options.model, threads=options.threads)
        tasks = ranking_tasks(rows, options.responses, options.limit)
        options.group = 1
    measure(contest, tasks, options.group, say_json)


if __name__ == "__main__":
    main()
