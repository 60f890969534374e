"""How fast a judge is, against the floor that its kernels set and against its neighbours (see `neighbours`).

The floor of a pair is what the native library needs for work that cannot be left out: each distinct prompt token
once at the rate measured behind a shared beginning, and each joint decoding step at the measured time of a step.
Contenders take turns group by group in one process, so that a drift of the machine's speed cancels in the ratios; a
ratio's spread is the middle half of the turns'. Direct mode takes one pair a turn, think mode as many as it decodes
together.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.console import progress
from gramlite.errors import InputError
from gramlite.generation.scaffold import OWN_TEMPLATE, ChatTemplate
from gramlite.judging.pair import Pair
from gramlite.options import chat_options
from gramlite.terminal import say, say_json

from .environment import versions
from .table import Column, Table, Value, three_digits
from .turns import Contender, Ratio, ratio, summary, take_turns, turns_of

if TYPE_CHECKING:
    from gramlite.judging.judge import Judge


CHARACTERS_LIMIT = 3500
RATIONALE_TOKENS = 256
JUDGE_ONCE = """
import sys, gramlite
from gramlite import RuntimeOptions, Settings
judge = gramlite.load(sys.argv[1], settings=Settings(mode="direct"), runtime=RuntimeOptions(context=4096))
judge(prompt="Explain. " * 400, response_a="One. " * 400, response_b="Two. " * 400)
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""


@dataclass(frozen=True)
class Kernels:
    """What the native library can do: prefill in tokens a second behind a shared beginning, and the seconds of a step."""

    prefill_rate: float
    step_seconds: float


def measure_kernels(judge: Judge, prompts: Sequence[Sequence[int]], shared: int, *, repetitions: int) -> Kernels | None:
    """Time bare calls on the judge's own context: prompts behind their `shared` first tokens, and joint steps.

    None for a judge that llama.cpp does not run.
    """
    backend: Any = judge.backend
    llama = getattr(backend, "_llama", None)
    if llama is None:
        return None
    sequences = range(1, backend._layout.parallel + 1)
    rates, steps = [], []
    for tokens in [*prompts] * repetitions:
        backend._forget()
        for sequence in sequences:
            list(backend._prompts.prefill(tokens[:shared], [sequence], 0))
            began = time.perf_counter()
            list(backend._prompts.prefill(tokens[shared:], [sequence], shared))
            rates.append((len(tokens) - shared) / (time.perf_counter() - began))
        for step in range(8):
            llama.begin()
            for sequence in sequences:
                llama.add([tokens[step]], [sequence], len(tokens) + step)
                llama.want(llama.filled - 1)
            began = time.perf_counter()
            llama.decode()
            steps.append(time.perf_counter() - began)
    backend._forget()
    return Kernels(statistics.median(rates), statistics.median(steps))


def floor_seconds(rows: Sequence[Mapping[str, Any]], kernels: Kernels, *, prefix_tokens: int, parallel: int) -> float:
    """The least seconds that rows judged together could have taken: distinct prompt tokens and joint decoding steps."""
    orders = [order for row in rows for order in row["orders"]]
    computed = sum(order["tokens"]["prompt"] + prefix_tokens - order["tokens"]["cached"] for order in orders)
    generated = [order["tokens"]["generated"] for order in orders]
    steps = max(max(generated, default=0), sum(generated) / parallel)
    seconds: float = computed / kernels.prefill_rate + steps * kernels.step_seconds
    return seconds


@dataclass(frozen=True)
class SpeedReport:
    """What was measured: seconds a pair by contender, ratios, kernels and overhead by mode, and the settings.

    The overhead over the floor can be negative in think mode, where tokens that were guessed right cost no step.
    """

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
    kernels: Kernels | None
    overhead: float | None


def time_mode(
    judge: Judge,
    plain: Sequence[Contender],
    pairs: Sequence[Pair],
    *,
    group: int,
    repetitions: int,
    tick: Callable[[], object] = lambda: None,
) -> Timed:
    """Let a judge and its plain contenders take turns, the judge's kernels measured before and after."""
    from gramlite.generation.prompt import encode_trusted

    groups: list[list[dict[str, Any]]] = []

    def judge_pairs(members: Sequence[Pair]) -> object:
        groups.append([verdict.to_json() for verdict in judge.many(members)])
        return groups[-1]

    form, mode = judge.template.form, judge.settings.mode
    prefix = len(encode_trusted(judge.backend.vocabulary, form.direct if mode == "direct" else form.opening))
    layout = getattr(judge.backend, "_layout", None)
    parallel: int = layout.parallel if layout else 1
    prompts = [judge._encode(pair, "ab").tokens for pair in pairs[: max(2, 6 // parallel)]]
    ours = Contender(f"gramlite, {mode}", judge_pairs)
    shared = len(judge._preamble) // 2
    before = measure_kernels(judge, prompts, shared, repetitions=1)
    take_turns([ours, *plain], pairs, group=group, repetitions=repetitions, tick=tick)
    after = measure_kernels(judge, prompts, shared, repetitions=1)
    if before is None or after is None:
        return Timed([ours, *plain], None, None)
    kernels = Kernels(
        statistics.mean([before.prefill_rate, after.prefill_rate]),
        statistics.mean([before.step_seconds, after.step_seconds]),
    )
    least = [floor_seconds(rows, kernels, prefix_tokens=prefix, parallel=parallel) / len(rows) for rows in groups[1:]]
    return Timed([ours, *plain], kernels, sum(ours.seconds) / sum(least) - 1 if sum(least) else None)


def measure_speed(
    model: Path,
    pairs: Sequence[Pair],
    *,
    repetitions: int,
    against: Sequence[str] = (),
    checkpoint: Path | None = None,
    chat: ChatTemplate = OWN_TEMPLATE,
) -> SpeedReport:
    """Time both modes of a judge on pairs, its kernels, and the neighbours that are asked for."""
    import gramlite
    from gramlite import RuntimeOptions, Settings
    from gramlite.judging.settings import THINK_SEQUENCES
    from gramlite.runtime.machine import thread_count

    context, threads = 4096, thread_count(None)
    load_seconds = 0.0
    timed: dict[str, Timed] = {}
    ratios: list[Ratio] = []
    for mode, parallel, group in (("direct", 1, 1), ("think", THINK_SEQUENCES, THINK_SEQUENCES)):
        settings = Settings(mode=mode, budget=RATIONALE_TOKENS)  # type: ignore[arg-type]
        began = time.perf_counter()
        with gramlite.load(
            model,
            settings=settings,
            runtime=RuntimeOptions(context=context, parallel=parallel, threads=threads),
            chat_template=chat.choice,
            trust_template=chat.trust,
        ) as judge:
            load_seconds = load_seconds or time.perf_counter() - began
            plain = neighbours_of(judge, model, against, checkpoint, threads=threads, context=context)
            turns = turns_of(1 + len(plain), len(pairs), group=group, repetitions=repetitions)
            with progress() as bar:
                tick = partial(bar.advance, bar.add_task(f"Timing {mode} mode", total=turns))
                timed[mode] = time_mode(judge, plain, pairs, group=group, repetitions=repetitions, tick=tick)
            ratios += [ratio(contender, timed[mode].contenders[0]) for contender in plain]
    return SpeedReport(
        {contender.name: summary(contender.seconds) for one in timed.values() for contender in one.contenders},
        ratios,
        {mode: one.kernels for mode, one in timed.items() if one.kernels},
        {f"gramlite, {mode}": one.overhead for mode, one in timed.items() if one.overhead is not None},
        settings_record(model, len(pairs), repetitions, threads, context, load_seconds),
    )


def neighbours_of(
    judge: Judge, model: Path, against: Sequence[str], checkpoint: Path | None, *, threads: int, context: int
) -> list[Contender]:
    """The neighbours asked for, each in the ways that the judge's mode has."""
    from .neighbours import PRECISIONS, Contest, llama_contest, transformers_contest

    contests: Contest = {}
    for name in against:
        if name in PRECISIONS:
            if checkpoint is None:
                raise InputError("--against transformers needs --checkpoint FOLDER: the same judge for transformers.")
            contests |= transformers_contest(
                judge, checkpoint, precision=PRECISIONS[name], threads=threads, tokens=RATIONALE_TOKENS
            )
        else:
            contests |= llama_contest(judge, model, threads=threads, context=context, tokens=RATIONALE_TOKENS)
    return [Contender(name, judge_pairs) for name, judge_pairs in contests.items()]


def settings_record(
    model: Path, pairs: int, repetitions: int, threads: int, context: int, load_seconds: float
) -> dict[str, Any]:
    """What a speed report was measured with."""
    from gramlite.formats.artifact import artifact_bytes

    return {
        "model": model.resolve().name,
        "bytes": artifact_bytes(model),
        "load_seconds": round(load_seconds, 3),
        "peak_memory_mib": peak_memory(model),
        "pairs": pairs,
        "repetitions": repetitions,
        "threads": threads,
        "context": context,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions(("gramlite", "llama-cpp-python", "numpy", "torch", "transformers")),
    }


def peak_memory(model: Path) -> float | None:
    """The most resident memory, in MiB, of a fresh process that judges a pair in direct mode with a context of 4,096.

    None where the system does not say.
    """
    import subprocess

    finished = subprocess.run(
        [sys.executable, "-c", JUDGE_ONCE, str(model)], capture_output=True, text=True, errors="replace"
    )
    return None if finished.returncode else round(float(finished.stdout), 1)


def read_pairs(path: Path, limit: int) -> list[Pair]:
    """The first pairs of a file that are short enough to compare with contenders of the same context."""
    from itertools import islice

    from gramlite.rows import Lines, read_rows

    with Lines(path) as stream:
        pairs = (row.value for row in read_rows(stream) if row.value)
        short = (p for p in pairs if len(p.prompt) + len(p.response_a) + len(p.response_b) < CHARACTERS_LIMIT)
        found = list(islice((p for p in short if p.response_a != p.response_b), limit))  # others take no judging
    if len(found) < 2:
        raise InputError(f"{path} holds fewer than two pairs under {CHARACTERS_LIMIT:,} characters.")
    return found


def speed_table(report: SpeedReport) -> Table:
    """A row for each contender: seconds a pair, how many times gramlite's that is, and what it takes over the floor."""
    ratios = {one.slower: one for one in report.ratios}
    rows: list[list[Value]] = []
    for name, times in report.contenders.items():
        one = ratios.get(name)
        times_ours = "1" if one is None else f"{one.median:.2f} ({one.low:.2f} to {one.high:.2f})"
        middle_half = f"{times['low']:.3f} to {times['high']:.3f}"
        rows.append([name, times["median"], middle_half, times_ours, report.overhead.get(name, "")])
    columns = [
        Column(""),
        Column("seconds a pair", three_digits),
        Column("middle half"),
        Column("times gramlite's"),
        Column("over the floor", "{:+.1%}".format),
    ]
    return Table("Both orders of a pair; contenders take turns in one run", columns, rows)


def show(report: SpeedReport) -> None:
    """Print a report as one readable table."""
    speed_table(report).show()
    for mode, kernels in report.kernels.items():
        rate, step = f"{kernels.prefill_rate:,.0f} tokens/s", f"{1000 * kernels.step_seconds:.2f} ms"
        say(f"Kernels of {mode} mode: prefill {rate}, a joint step {step}.")
    say(", ".join(f"{key} {value}" for key, value in report.settings.items() if key != "versions"))


@click.command()
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), metavar="MODEL",
    help="GGUF file or artifact folder.  [default: the reference judge]",
)  # fmt: skip
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Pairs to time.  [default: twelve packaged ones]",
)
@click.option("--limit", type=click.IntRange(2), default=20, show_default=True, metavar="N", help="How many pairs.")
@click.option(
    "--repetitions", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="How often each is timed."
)
@click.option(
    "--against",
    default="",
    metavar="NAMES",
    help="Also time these: llama-cpp-python, transformers (float32), transformers:bfloat16.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="The same judge for transformers.  [default: the reference judge's]",
)
@chat_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object, also on a terminal.")
def command(
    model: Path | None,
    pairs: Path | None,
    limit: int,
    repetitions: int,
    against: str,
    checkpoint: Path | None,
    chat: ChatTemplate,
    as_json: bool,
) -> None:
    """Time a judge: both modes, the floor that llama.cpp's kernels set where it runs the model, and its neighbours."""
    import tempfile
    from contextlib import ExitStack
    from importlib import resources

    from .neighbours import PRECISIONS, parse_against

    names = parse_against(against)
    packaged = Path(str(resources.files("gramlite").joinpath("data/pairs.jsonl")))
    timed = read_pairs(pairs or packaged, limit)
    with ExitStack() as stack:
        if checkpoint is None and PRECISIONS.keys() & names:
            if model is not None:
                raise InputError("--against transformers needs --checkpoint FOLDER: the same judge for transformers.")
            from gramlite.reference.files import build_checkpoint

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gramlite-"))
            checkpoint = build_checkpoint(Path(folder) / "checkpoint")
        if model is None:
            from gramlite.reference.files import cached_gguf

            model = cached_gguf()
        report = measure_speed(model, timed, repetitions=repetitions, against=names, checkpoint=checkpoint, chat=chat)
    if as_json or not sys.stdout.isatty():
        say_json(report.to_json())
    else:
        show(report)
