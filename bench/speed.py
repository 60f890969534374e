"""How fast a judge is, against the floor that its kernels set and against plain llama-cpp-python.

The floor of a pair is what the native library needs for work that cannot be left out: each distinct prompt token
once at the rate measured behind a shared beginning, and each joint decoding step at the measured time of a step.
Contenders take turns group by group in one process, so that a drift of the machine's speed cancels in the ratios; a
ratio's spread is the middle half of the turns'. Direct mode takes one pair a turn, think mode as many as it decodes
together.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
    """Something that judges pairs in both orders, and the seconds a pair that each turn took."""

    name: str
    judge: Callable[[Sequence[Pair]], object]
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """How many times longer `slower` takes than `faster`, turn by turn: median and middle half."""

    slower: str
    faster: str
    median: float
    low: float
    high: float
    turns: int


def take_turns(contenders: Sequence[Contender], pairs: Sequence[Pair], *, group: int, repetitions: int) -> None:
    """Let the contenders judge each group of pairs in turn, after a warm-up group that is not counted."""
    groups = [pairs[start : start + group] for start in range(0, len(pairs), group)]
    for contender in contenders:
        contender.judge(groups[0])
    for repetition in range(repetitions):
        for index, members in enumerate(groups):
            shift = (index + repetition) % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                began = time.perf_counter()
                contender.judge(members)
                contender.seconds.append((time.perf_counter() - began) / len(members))


def ratio(slower: Contender, faster: Contender) -> Ratio:
    """The ratio of two contenders' times; both took the same groups of pairs."""
    ratios = sorted(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(slower.name, faster.name, middle, low, high, len(ratios))


@dataclass(frozen=True)
class Kernels:
    """What the native library can do: prefill in tokens a second behind a shared beginning, and the seconds of a step."""

    prefill_rate: float
    step_seconds: float


def measure_kernels(judge: Judge, prompts: Sequence[Sequence[int]], shared: int, *, repetitions: int) -> Kernels:
    """Time bare calls on the judge's own context: prompts behind their `shared` first tokens, and joint steps."""
    backend: Any = judge.backend
    sequences = range(1, backend._layout.parallel + 1)
    rates, steps = [], []
    for tokens in [*prompts] * repetitions:
        backend._forget()
        for sequence in sequences:
            backend._prefill(tokens[:shared], [sequence], 0)
            began = time.perf_counter()
            backend._prefill(tokens[shared:], [sequence], shared)
            rates.append((len(tokens) - shared) / (time.perf_counter() - began))
            if sequence == 1 and len(sequences) == 1:
                break
        for step in range(8):
            backend._batch.n_tokens = 0
            for sequence in sequences:
                backend._add([tokens[step]], [sequence], len(tokens) + step)
                backend._batch.logits[backend._batch.n_tokens - 1] = True
            began = time.perf_counter()
            backend._decode()
            steps.append(time.perf_counter() - began)
    backend._forget()
    return Kernels(statistics.median(rates), statistics.median(steps))


def floor_seconds(rows: Sequence[Mapping[str, Any]], kernels: Kernels, *, prefix_tokens: int, parallel: int) -> float:
    """The least seconds that rows judged together could have taken: distinct prompt tokens and joint decoding steps."""
    orders = [order for row in rows for order in row["orders"]]
    computed = sum(order["tokens"]["prompt"] + prefix_tokens - order["tokens"]["cached"] for order in orders)
    generated = [order["tokens"]["generated"] for order in orders]
    steps = max(max(generated), sum(generated) / parallel)
    return computed / kernels.prefill_rate + steps * kernels.step_seconds


def plain_contenders(judge: Judge, model: Path, *, threads: int, context: int) -> list[Contender]:
    """llama-cpp-python as people use it: a probability by logprobs, a bare letter, and a written rationale."""
    import llama_cpp

    from gramlite.template import presented

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

    def complete(llama: Any, logprobs: int | None) -> Callable[[Sequence[Pair]], object]:
        def prompt(pair: Pair, swap: bool) -> str:
            return judge.scaffold.before + message(pair, swap) + judge.scaffold.after + prefix

        def judge_pairs(pairs: Sequence[Pair]) -> object:
            asked = {"max_tokens": 1, "temperature": 0, "logprobs": logprobs}
            return [llama.create_completion(prompt(pair, swap), **asked) for pair in pairs for swap in (False, True)]

        return judge_pairs

    def chat(pairs: Sequence[Pair]) -> object:
        asked = {"max_tokens": RATIONALE_TOKENS, "temperature": 0}
        return [
            chatting.create_chat_completion([{"role": "user", "content": message(pair, swap)}], **asked)
            for pair in pairs
            for swap in (False, True)
        ]

    return [
        Contender("llama-cpp-python, probability", complete(scored, 5)),
        Contender("llama-cpp-python, letter", complete(lettered, None)),
        Contender("llama-cpp-python, rationale", chat),
    ]


@dataclass(frozen=True)
class SpeedReport:
    """What was measured: seconds a pair by contender, ratios, kernels and overhead by mode, and the settings."""

    contenders: dict[str, dict[str, float]]
    ratios: list[Ratio]
    kernels: dict[str, Kernels]
    overhead: dict[str, float]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "contenders": self.contenders,
            "ratios": [vars(one) for one in self.ratios],
            "kernels": {mode: vars(kernels) for mode, kernels in self.kernels.items()},
            "overhead_over_floor": self.overhead,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Timed:
    """One mode's turns: its contenders, ours first, its kernels and how much longer than the floor it took."""

    contenders: list[Contender]
    kernels: Kernels
    overhead: float


def time_mode(
    judge: Judge, plain: Sequence[Contender], pairs: Sequence[Pair], *, group: int, repetitions: int
) -> Timed:
    """Let a judge and its plain contenders take turns, the judge's kernels measured before and after."""
    from gramlite.prompt import encode_trusted

    groups: list[list[dict[str, Any]]] = []

    def judge_pairs(members: Sequence[Pair]) -> object:
        groups.append([verdict.to_json() for verdict in judge.many(members)])
        return groups[-1]

    form, mode = judge.template.form, judge.settings.mode
    prefix = len(encode_trusted(judge.backend.vocabulary, form.direct if mode == "direct" else form.opening))
    parallel: int = judge.backend._layout.parallel  # type: ignore[attr-defined]
    prompts = [judge._encode(pair, "ab").tokens for pair in pairs[: max(2, 6 // parallel)]]
    ours = Contender(f"gramlite, {mode}", judge_pairs)
    shared = len(judge._preamble) // 2
    before = measure_kernels(judge, prompts, shared, repetitions=1)
    take_turns([ours, *plain], pairs, group=group, repetitions=repetitions)
    after = measure_kernels(judge, prompts, shared, repetitions=1)
    kernels = Kernels(
        statistics.mean([before.prefill_rate, after.prefill_rate]),
        statistics.mean([before.step_seconds, after.step_seconds]),
    )
    least = [floor_seconds(rows, kernels, prefix_tokens=prefix, parallel=parallel) / len(rows) for rows in groups[1:]]
    return Timed([ours, *plain], kernels, sum(ours.seconds) / sum(least) - 1)


def measure_speed(model: Path, pairs: Sequence[Pair], *, repetitions: int, against: Sequence[str]) -> SpeedReport:
    """Time both modes of a judge on pairs, its kernels, and plain llama-cpp-python where it is asked for."""
    import gramlite
    from gramlite import RuntimeOptions, Settings
    from gramlite.commands.options import THINK_PARALLEL
    from gramlite.device import thread_count

    context, threads = 4096, thread_count(None)
    load_seconds = 0.0
    timed: dict[str, Timed] = {}
    ratios: list[Ratio] = []
    for mode, parallel, group in (("direct", 1, 1), ("think", THINK_PARALLEL, THINK_PARALLEL)):
        settings = Settings(mode=mode, budget=RATIONALE_TOKENS)  # type: ignore[arg-type]
        began = time.perf_counter()
        with gramlite.load(
            model, settings=settings, runtime=RuntimeOptions(context=context, parallel=parallel, threads=threads)
        ) as judge:
            load_seconds = load_seconds or time.perf_counter() - began
            plain = []
            if "llama-cpp-python" in against:
                plain = plain_contenders(judge, model, threads=threads, context=context)
                plain = plain[:2] if mode == "direct" else plain[2:]
            timed[mode] = time_mode(judge, plain, pairs, group=group, repetitions=repetitions)
            ratios += [ratio(contender, timed[mode].contenders[0]) for contender in plain]
    return SpeedReport(
        {contender.name: summary(contender.seconds) for one in timed.values() for contender in one.contenders},
        ratios,
        {mode: one.kernels for mode, one in timed.items()},
        {f"gramlite, {mode}": one.overhead for mode, one in timed.items()},
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
    for mode, kernels in report.kernels.items():
        rate, step = f"{kernels.prefill_rate:,.0f} tokens/s", f"{1000 * kernels.step_seconds:.2f} ms"
        console.print(f"Kernels of {mode} mode: prefill {rate}, a joint step {step}.")
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
