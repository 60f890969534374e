"""A GPTQ folder on the CPU: through gramlite, beside a GGUF file of its size and beside transformers with gptqmodel.

    python bench/claims/gptq_speed.py FOLDER PAIRS.jsonl --twin Q4_0.gguf --against gptqmodel

With `--twin` both judge the same pairs in turn, in think mode. With `--against gptqmodel` (extra gptq-cuda) both read the
same tokens, the beginning of a pair's prompt, and then write a few, in turn. One JSON object a turn; the last has the
ratios, median and middle half.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gramlite.bench.speed import read_pairs
from gramlite.bench.turns import Contender, Ratio, ratio, take_turns

import gramlite
from gramlite.backends.cache_keyword import with_cache
from gramlite.judging.judge import Judge
from gramlite.judging.pair import Pair
from gramlite.runtime.machine import thread_count
from gramlite.terminal import say_json

Say = Callable[[dict[str, Any]], None]


@dataclass
class Reader:
    """Something that reads tokens and then writes one after another; what a token took, by turns, in seconds."""

    name: str
    read: Callable[[Sequence[int]], object]
    write: Callable[[int, int], object]  # a token, and how many stand before it
    reading: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)


def through_llama(judge: Judge) -> Reader:
    """The judge's own llama.cpp context, called as the judge calls it; the judge itself must not be used afterwards."""
    backend: Any = judge.backend
    llama = backend._llama

    def read(tokens: Sequence[int]) -> None:
        backend._forget()
        list(backend._prompts.prefill(list(tokens), [1], 0))

    def write(token: int, position: int) -> None:
        llama.begin()
        llama.add([token], [1], position)
        llama.want(llama.filled - 1)
        llama.decode()

    return Reader("gramlite", read, write)


def through_gptqmodel(folder: Path, threads: int) -> Reader:
    """The folder in transformers, whose linear layers gptqmodel computes."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(threads))  # its own default crashes where there are few cores
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    linear = type(model.get_submodule("model.layers.0.mlp.down_proj"))
    if not linear.__module__.startswith("gptqmodel"):
        raise SystemExit(f"transformers computes {folder} with {linear}, not with gptqmodel.")
    kept: dict[str, Any] = {}

    def forward(tokens: Sequence[int]) -> None:
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            model(ids, use_cache=True, logits_to_keep=1, **with_cache(model, kept["cache"]))

    def read(tokens: Sequence[int]) -> None:
        kept["cache"] = DynamicCache(config=model.config)
        forward(tokens)

    return Reader(f"transformers + gptqmodel, {linear.__name__}", read, lambda token, _: forward([token]))


def read_and_write(readers: Sequence[Reader], prompts: Sequence[Sequence[int]], tokens: int, say: Say) -> None:
    """Let the readers take turns on each prompt, after a warm-up; each then writes `tokens` more behind it."""
    for reader in readers:
        reader.read(prompts[0][:8])
        reader.write(prompts[0][8], 8)
    for turn, prompt in enumerate(prompts):
        shift = turn % len(readers)
        for reader in [*readers[shift:], *readers[:shift]]:
            began = time.perf_counter()
            reader.read(prompt)
            middle = time.perf_counter()
            for step in range(tokens):
                reader.write(prompt[step], len(prompt) + step)
            reader.reading.append((middle - began) / len(prompt))
            reader.writing.append((time.perf_counter() - middle) / tokens)
        rates = {
            each.name: {"read": round(1 / each.reading[-1], 2), "write": round(1 / each.writing[-1], 2)}
            for each in readers
        }
        say({"prompt_tokens": len(prompt), "tokens_per_second": rates})


def against_gptqmodel(judge: Judge, folder: Path, pairs: Sequence[Pair], options: Any, say: Say) -> list[Ratio]:
    """Reading and writing through gptqmodel and through gramlite."""
    readers = [through_gptqmodel(folder, options.threads), through_llama(judge)]
    prompts = [judge._encode(pair, "ab").tokens[: options.read] for pair in pairs[: options.turns]]
    read_and_write(readers, prompts, options.write, say)
    return [
        ratio(*(Contender(f"{each.name}, {doing}", list, getattr(each, doing)) for each in readers))
        for doing in ("reading", "writing")
    ]


def beside_twin(judge: Judge, twin: Judge, pairs: Sequence[Pair], say: Say) -> list[Ratio]:
    """The same pairs judged by the folder and by a GGUF file, seconds a token that was computed."""
    contenders = []
    for name, one in (("the folder", judge), ("the GGUF file", twin)):
        contenders.append(Contender(name, lambda members, one=one: list(one.many(members))))  # type: ignore[misc]
    computed: dict[str, list[int]] = {each.name: [] for each in contenders}
    for each in contenders:
        each.judge = counting(each.judge, computed[each.name])
    take_turns(contenders, pairs, group=1, repetitions=1)
    for each in contenders:
        counts = computed[each.name][1:]  # the first is the warm-up's
        each.seconds[:] = [seconds / count for seconds, count in zip(each.seconds, counts, strict=True)]
        say({"contender": each.name, "tokens": sum(counts), "seconds_per_token": [round(s, 6) for s in each.seconds]})
    return [ratio(*contenders)]


def counting(judge: Callable[[Sequence[Pair]], Any], counts: list[int]) -> Callable[[Sequence[Pair]], object]:
    """The same judging, noting how many tokens it computed: prompts' that were not kept, and rationales'."""

    def judge_counted(pairs: Sequence[Pair]) -> object:
        verdicts = judge(pairs)
        tokens = [order.tokens for verdict in verdicts for order in verdict.orders]
        counts.append(sum(each["prompt"] - each["cached"] + each["generated"] for each in tokens))
        return verdicts

    return judge_counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", type=Path, help="pairs, JSONL")
    parser.add_argument("--twin", type=Path, help="a GGUF file of the same size")
    parser.add_argument("--against", choices=["gptqmodel"])
    parser.add_argument("--limit", type=int, default=16, help="pairs to judge beside the twin")
    parser.add_argument("--budget", type=int, default=64, help="most tokens of a rationale beside the twin")
    parser.add_argument("--turns", type=int, default=4, help="prompts to read beside gptqmodel")
    parser.add_argument("--read", type=int, default=128, help="tokens of each")
    parser.add_argument("--write", type=int, default=8, help="tokens to write behind each")
    parser.add_argument("--threads", type=int, default=thread_count(None))
    options = parser.parse_args()

    def say(row: dict[str, Any]) -> None:
        say_json(row)

    settings = gramlite.Settings(budget=options.budget)
    runtime = gramlite.RuntimeOptions(device="cpu", threads=options.threads)
    pairs = read_pairs(options.pairs, options.limit)
    ratios = []
    with gramlite.load(options.folder, settings=settings, runtime=runtime) as judge:
        if options.twin:
            with gramlite.load(options.twin, settings=settings, runtime=runtime) as twin:
                ratios += beside_twin(judge, twin, pairs, say)
        if options.against:
            ratios += against_gptqmodel(judge, options.folder, pairs, options, say)
    say({"threads": options.threads, "ratios": [asdict(one) for one in ratios]})


if __name__ == "__main__":
    main()
