"""How fast a judge is, against the floor that its kernels set and against plain llama-cpp-python.

The floor of a pair is what the native library needs for work that cannot be left out: each distinct prompt token
once at the measured prefill rate, and each decoding step at the measured time of a step. Contenders take turns pair
by pair in one process, so that a drift of the machine's speed cancels in the ratios; a ratio's spread is the middle
half of the pairs'.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import InputError
from gramlite.pair import Pair

if TYPE_CHECKING:
    from gramlite.judge import Judge

CHARACTERS_LIMIT = 3500
RATIONALE_TOKENS = 256


@dataclass
class Contender:
    """Something that judges a pair in both orders, and the seconds each pair took it, by repetition."""

    name: str
    judge: Callable[[Pair], object]
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """How many times longer `slower` takes than `faster`, pair by pair: median and middle half."""

    slower: str
    faster: str
    median: float
    low: float
    high: float
    pairs: int


def take_turns(contenders: Sequence[Contender], pairs: Sequence[Pair], *, repetitions: int) -> None:
    """Let the contenders judge each pair in turn, after one warm-up pair that is not counted."""
    for contender in contenders:
        contender.judge(pairs[0])
    for repetition in range(repetitions):
        for index, pair in enumerate(pairs):
            shift = (index + repetition) % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                began = time.perf_counter()
                contender.judge(pair)
                contender.seconds.append(time.perf_counter() - began)


def ratio(slower: Contender, faster: Contender) -> Ratio:
    """The ratio of two contenders' times; both took the same pairs, each in its own order of turns."""
    ratios = sorted(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(slower.name, faster.name, middle, low, high, len(ratios))


@dataclass(frozen=True)
class Kernels:
    """What the native library can do: prefill in tokens a second, and the seconds of one step of two sequences."""

    prefill_rate: float
    step_seconds: float


def measure_kernels(judge: Judge, prompts: Sequence[Sequence[int]], *, repetitions: int) -> Kernels:
    """Time bare prefills of whole prompts and bare steps of two sequences, on the judge's own context."""
    backend: Any = judge.backend
    rates, steps = [], []
    for tokens in [*prompts] * repetitions:
        backend._forget()
        began = time.perf_counter()
        backend._prefill(tokens, 1, 0, want_logits=True)
        rates.append(len(tokens) / (time.perf_counter() - began))
        backend._prefill(tokens, 2, 0, want_logits=True)
        for step in range(8):
            backend._batch.n_tokens = 0
            for sequence in (1, 2):
                backend._add([tokens[step]], sequence, len(tokens) + step)
                backend._batch.logits[backend._batch.n_tokens - 1] = True
            began = time.perf_counter()
            backend._decode()
            steps.append(time.perf_counter() - began)
    backend._forget()
    return Kernels(statistics.median(rates), statistics.median(steps))


def floor_seconds(verdicts: Iterable[Mapping[str, Any]], kernels: Kernels, prefix_tokens: int) -> float:
    """The least seconds that judged rows could have taken: distinct prompt tokens and joint decoding steps."""
    total = 0.0
    for row in verdicts:
        computed = sum(order["tokens"]["prompt"] + prefix_tokens - order["tokens"]["cached"] for order in row["orders"])
        steps = max(order["tokens"]["generated"] for order in row["orders"])
        total += computed / kernels.prefill_rate + (steps + (steps > 0)) * kernels.step_seconds
    return total


def plain_contenders(judge: Judge, model: Path, *, threads: int, context: int) -> list[Contender]:
    """llama-cpp-python as people use it: a probability by logprobs, a bare letter, and a written rationale."""
    import llama_cpp

    def open_model(logits_all: bool) -> Any:
        return llama_cpp.Llama(
            str(model), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=logits_all, verbose=False
        )

    scored, lettered, chatting = open_model(True), open_model(False), open_model(False)
    prefix = judge.template.form.direct

    def message(pair: Pair, swap: bool) -> str:
        first, second = (pair.response_b, pair.response_a) if swap else (pair.response_a, pair.response_b)
        shown = judge.template.segments(presented(Pair(pair.prompt, first, second), "ab"))
        return "".join(segment.text for segment in shown)

    from gramlite.template import presented

    def complete(llama: Any, logprobs: int | None) -> Callable[[Pair], object]:
        def both_orders(pair: Pair) -> object:
            scaffold = judge.scaffold
            return [
                llama.create_completion(
                    scaffold.before + message(pair, swap) + scaffold.after + prefix,
                    max_tokens=1,
                    temperature=0,
                    logprobs=logprobs,
                )
                for swap in (False, True)
            ]

        return both_orders

    def chat(pair: Pair) -> object:
        return [
            chatting.create_chat_completion(
                [{"role": "user", "content": message(pair, swap)}], max_tokens=RATIONALE_TOKENS, temperature=0
            )
            for swap in (False, True)
        ]

    return [
        Contender("llama-cpp-python, probability", complete(scored, 5)),
        Contender("llama-cpp-python, letter", complete(lettered, None)),
        Contender("llama-cpp-python, rationale", chat),
    ]


@dataclass(frozen=True)
class SpeedReport:
    """What was measured: seconds a pair by contender, ratios, kernels, floors and the machine."""

    contenders: dict[str, dict[str, float]]
    ratios: list[Ratio]
    kernels: Kernels
    overhead: dict[str, float]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "contenders": self.contenders,
            "ratios": [vars(one) for one in self.ratios],
            "kernels": vars(self.kernels),
            "overhead_over_floor": self.overhead,
            "settings": self.settings,
        }


def measure_speed(model: Path, pairs: Sequence[Pair], *, repetitions: int, against: Sequence[str]) -> SpeedReport:
    """Time both modes of a judge on pairs, its kernels, and plain llama-cpp-python where it is asked for."""
    import gramlite
    from gramlite import RuntimeOptions, Settings
    from gramlite.device import thread_count
    from gramlite.prompt import encode_trusted

    context, threads = 4096, thread_count(None)
    runtime = RuntimeOptions(context=context, parallel=2, threads=threads)
    began = time.perf_counter()
    judge = gramlite.load(model, settings=Settings(mode="direct"), runtime=runtime)
    load_seconds = time.perf_counter() - began
    thinking = judge.with_settings(mode="think", budget=RATIONALE_TOKENS)
    rows: dict[str, list[dict[str, Any]]] = {"gramlite, direct": [], "gramlite, think": []}

    def ours(name: str, using: Judge) -> Contender:
        def judge_pair(pair: Pair) -> object:
            verdict = using(prompt=pair.prompt, response_a=pair.response_a, response_b=pair.response_b)
            rows[name].append(verdict.to_json())
            return verdict

        return Contender(name, judge_pair)

    direct, think = ours("gramlite, direct", judge), ours("gramlite, think", thinking)
    vocabulary = judge.backend.vocabulary
    prompts = [judge._prepare(pair).prompts["ab"].tokens for pair in pairs[:6]]  # type: ignore[union-attr]
    kernels = measure_kernels(judge, prompts, repetitions=2)
    contenders = [direct, think]
    ratios = []
    if "llama-cpp-python" in against:
        plain = plain_contenders(judge, model, threads=threads, context=context)
        contenders += plain
    # each mode's own prefixes stay computed between its pairs, as they do when it is used alone
    take_turns([direct, *contenders[2:4]], pairs, repetitions=repetitions)
    take_turns([think, *contenders[4:]], pairs, repetitions=repetitions)
    if len(contenders) > 2:
        ratios = [ratio(plain[0], direct), ratio(plain[1], direct), ratio(plain[2], think)]
    again = measure_kernels(judge, prompts, repetitions=2)
    kernels = Kernels((kernels.prefill_rate + again.prefill_rate) / 2, (kernels.step_seconds + again.step_seconds) / 2)
    prefixes = {
        "gramlite, direct": len(encode_trusted(vocabulary, judge.template.form.direct)),
        "gramlite, think": len(encode_trusted(vocabulary, judge.template.form.opening)),
    }
    overhead = {
        name: sum(contender.seconds) / floor_seconds(rows[name][1:], kernels, prefixes[name]) - 1
        for name, contender in (("gramlite, direct", direct), ("gramlite, think", think))
    }
    judge.close()
    return SpeedReport(
        {contender.name: summary(contender.seconds) for contender in contenders},
        ratios,
        kernels,
        overhead,
        settings_record(model, len(pairs), repetitions, threads, context, load_seconds),
    )


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and middle half of times in seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median": middle, "low": low, "high": high}


def settings_record(
    model: Path, pairs: int, repetitions: int, threads: int, context: int, load_seconds: float
) -> dict[str, Any]:
    """What a speed report was measured with."""
    import importlib.metadata
    import platform

    versions = {name: importlib.metadata.version(name) for name in ("gramlite", "llama-cpp-python", "numpy")}
    return {
        "model": model.name,
        "bytes": model.stat().st_size,
        "load_seconds": round(load_seconds, 3),
        "peak_memory_mib": peak_memory(model),
        "pairs": pairs,
        "repetitions": repetitions,
        "threads": threads,
        "context": context,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def peak_memory(model: Path) -> float:
    """The most resident memory, in MiB, of a fresh process that judges pairs in direct mode with a context of 4,096."""
    import subprocess

    code = (
        "import sys, gramlite\n"
        "from gramlite import RuntimeOptions, Settings\n"
        "judge = gramlite.load(sys.argv[1], settings=Settings(mode='direct'), runtime=RuntimeOptions(context=4096))\n"
        "judge(prompt='Explain. ' * 400, response_a='One. ' * 400, response_b='Two. ' * 400)\n"
        "status = open('/proc/self/status').read()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]) / 1024)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    return round(float(finished.stdout), 1)


def read_pairs(path: Path, limit: int) -> list[Pair]:
    """The first pairs of a file that are short enough to compare with contenders of the same context."""
    import gzip
    from itertools import islice

    from gramlite.rows import read_rows

    opened: Any = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    with opened as stream:
        pairs = (row.pair for row in read_rows(stream) if row.pair)
        short = (p for p in pairs if len(p.prompt) + len(p.response_a) + len(p.response_b) < CHARACTERS_LIMIT)
        found = list(islice(short, limit))
    if len(found) < 2:
        raise InputError(f"{path} holds fewer than two pairs under {CHARACTERS_LIMIT:,} characters.")
    return found


def show(report: SpeedReport) -> None:
    """Print a report as readable tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="Seconds a pair, both orders", title_justify="left")
    for heading in ("", "median", "middle half", "over the floor"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times in report.contenders.items():
        overhead = report.overhead.get(name)
        above = "" if overhead is None else f"{overhead:+.1%}"
        table.add_row(name, f"{times['median']:.3f}", f"{times['low']:.3f} to {times['high']:.3f}", above)
    console.print(table)
    for one in report.ratios:
        console.print(
            f"{one.slower} takes {one.median:.2f} times as long as {one.faster} ({one.low:.2f} to {one.high:.2f})"
        )
    console.print(
        f"Kernels: prefill {report.kernels.prefill_rate:,.0f} tokens/s, a step of two sequences "
        f"{1000 * report.kernels.step_seconds:.2f} ms."
    )
    console.print(", ".join(f"{key} {value}" for key, value in report.settings.items() if key != "versions"))


@click.command()
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), metavar="MODEL", help="GGUF file.  [default: the reference judge]"
)
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, exists=True),
    metavar="FILE",
    help="Pairs to time.  [default: twelve packaged ones]",
)
@click.option("--limit", type=click.IntRange(2), default=20, show_default=True, metavar="N", help="How many pairs.")
@click.option(
    "--repetitions", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="How often each is timed."
)
@click.option("--against", default="", metavar="NAMES", help="Also time these: llama-cpp-python.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, also on a terminal.")
def command(model: Path | None, pairs: Path | None, limit: int, repetitions: int, against: str, as_json: bool) -> None:
    """Time a GGUF judge: both modes, the floor its kernels set, and plain llama-cpp-python beside it."""
    from importlib import resources

    names = [name.strip() for name in against.split(",") if name.strip()]
    if unknown := set(names) - {"llama-cpp-python"}:
        raise InputError(f"--against does not know {', '.join(sorted(unknown))}. It knows llama-cpp-python.")
    if model is None:
        from gramlite.reference import cached_gguf

        model = cached_gguf()
    packaged = Path(str(resources.files("gramlite").joinpath("data/pairs.jsonl")))
    report = measure_speed(model, read_pairs(pairs or packaged, limit), repetitions=repetitions, against=names)
    if as_json or not sys.stdout.isatty():
        click.echo(json.dumps(report.to_json()))
    else:
        show(report)
