"""What a quantization costs a judge's verdicts: the distance of its margins from gold ones, for several files at once.

`gramlite bench quality MODEL... --pairs SUITE:FILE --gold FILE -o FOLDER` judges each pair in direct mode, both
orders, and goes on where it was stopped. The error of a pair is the mean over its orders of |margin - gold margin|
in nats; intervals are 95 % bootstraps over pairs.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gramlite.errors import InputError
from gramlite.formats.artifact import read_manifest
from gramlite.formats.gguf_header import read_header
from gramlite.formats.quantization import bits_per_weight
from gramlite.generation.scaffold import OWN_TEMPLATE, ChatTemplate
from gramlite.judging.pair import Pair
from gramlite.options import chat_options, labels_option
from gramlite.rows import identifier_text
from gramlite.terminal import note, say, say_json

from .folder import ROWS, Row, Run, read_run
from .run import Work, describe_artifact, run_suite
from .statistics import Estimate, bootstrap_mean
from .suites import Said, load_pairs, open_suite
from .tables import markdown_table


@dataclass(frozen=True)
class Quality:
    """One model's distance from gold over the pairs it has judged.

    `error` is the mean |margin - gold| in nats and `change` that of the first model taken from it, pair by pair;
    `slope` is the factor by which margins stretch or shrink; `flips` counts pairs with another verdict, `order_flips`
    single orders.
    """

    name: str
    bytes: int
    bits_per_weight: float
    error: Estimate
    change: Estimate
    slope: float
    worst: float
    flips: int
    order_flips: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "error": self.error.to_json(),
            "change": self.change.to_json(),
            "slope": round(self.slope, 4),
            "worst": round(self.worst, 4),
            "flips": self.flips,
            "order_flips": self.order_flips,
        }


class TimeIsUp(Exception):
    """The seconds that a measurement may take are over."""


@dataclass(frozen=True)
class Clock:
    """Ends a run between two pairs once its time is over."""

    deadline: float

    def show(self, row: Mapping[str, Any], verdict: object) -> None:
        if time.monotonic() > self.deadline:
            raise TimeIsUp


def choose_pairs(pairs: Sequence[Pair], gold: Run, *, rows: int, longest: int | None) -> list[Pair]:
    """The first `rows` pairs that have a gold verdict and a prompt of at most `longest` tokens in both orders.

    Raises InputError where there are fewer.
    """

    def fits(pair: Pair) -> bool:
        row = gold.rows.get(identifier_text(pair.id))
        return row is not None and (longest is None or max(row["prompt_tokens"]) <= longest)

    chosen = [pair for pair in pairs if fits(pair)][:rows]
    if len(chosen) < rows:
        raise InputError(f"Only {len(chosen)} pairs have a gold verdict and fit. Lower --rows or raise --longest.")
    return chosen


def read_gold(path: Path) -> Run:
    """Gold verdicts, each with its prompts' lengths in tokens."""
    from .records import read_records

    run = read_run(path)
    lengths = {
        identifier_text(record["id"]): (record["tokens_ab"], record["tokens_ba"]) for _, record in read_records(path)
    }
    rows = {identifier: row | {"prompt_tokens": lengths[identifier]} for identifier, row in run.rows.items()}
    return Run(run.name, run.path, rows)


def judge_model(model: Path, work: Work, folder: Path, *, deadline: float, chat: ChatTemplate = OWN_TEMPLATE) -> bool:
    """Judge what is not judged yet; whether all is done before the deadline."""
    from gramlite.judging.judge import Settings
    from gramlite.loading import load

    if _is_complete(folder, work, model):
        return True
    if time.monotonic() > deadline:
        return False
    settings = Settings(mode="direct")
    with load(model, settings=settings, chat_template=chat.choice, trust_template=chat.trust) as judge:
        try:
            run_suite(judge, work, folder, display=Clock(deadline), resume=True)
        except TimeIsUp:
            return _is_complete(folder, work, model)
    return True


def _is_complete(folder: Path, work: Work, model: Path) -> bool:
    """Whether this very model has judged all pairs; rows of another file of that name don't count."""
    from gramlite.loading import artifact_sha256

    try:
        run = read_run(folder)
    except InputError:
        return False
    wanted = {identifier_text(pair.id) for pair in work.pairs}
    return run.rows.keys() >= wanted and run.model.get("sha256") == artifact_sha256(model)


def file_bits(model: Path) -> float:
    """Bits a weight takes on average: the manifest's word, else what a GGUF's header adds up to."""
    manifest = read_manifest(model)
    if manifest and manifest.bits_per_weight:
        return manifest.bits_per_weight
    return bits_per_weight(read_header(model))


def assess(name: str, model: Path, run: Run, gold: Run, pairs: Sequence[Pair], first: Run) -> Quality:
    """A model's figures over those of the pairs that it and the first model have judged."""
    asked = (identifier_text(pair.id) for pair in pairs)
    identifiers = [identifier for identifier in asked if identifier in run.rows and identifier in first.rows]
    if not identifiers:
        raise InputError(f"{name} has judged nothing yet. Give it more --seconds.")
    errors, base = ([_error(each.rows[i], gold.rows[i]) for i in identifiers] for each in (run, first))
    pairs_of = [
        (mine, right)
        for i in identifiers
        for mine, right in zip(_margins(run.rows[i]), _margins(gold.rows[i]), strict=True)
    ]
    return Quality(
        name=name,
        bytes=describe_artifact(model)["bytes"],
        bits_per_weight=file_bits(model),
        error=bootstrap_mean(errors),
        change=bootstrap_mean([mine - other for mine, other in zip(errors, base, strict=True)]),
        slope=sum(mine * right for mine, right in pairs_of) / sum(right * right for _, right in pairs_of),
        worst=max(abs(mine - right) for mine, right in pairs_of),
        flips=sum(run.rows[i]["verdict"] != gold.rows[i]["verdict"] for i in identifiers),
        order_flips=sum((mine > 0) != (right > 0) for mine, right in pairs_of),
    )


def _margins(row: Row) -> list[float]:
    """The margins of the orders ab and ba; a row without verdict counts as no preference."""
    found = {order["order"]: order["margin"] for order in row["orders"]}
    return [0.0 if found.get(order) is None else float(found[order]) for order in ("ab", "ba")]


def _error(row: Row, gold: Row) -> float:
    differences = [abs(mine - right) for mine, right in zip(_margins(row), _margins(gold), strict=True)]
    return math.fsum(differences) / len(differences)


def table_row(quality: Quality, *, is_first: bool) -> dict[str, str]:
    """A row of the Markdown table."""
    error, change = quality.error, quality.change
    return {
        "file": quality.name,
        "MB": f"{quality.bytes / 1e6:.1f}",
        "bits per weight": f"{quality.bits_per_weight:.2f}",
        "mean margin error, nats": f"{error.value:.3f} ({error.low:.3f} to {error.high:.3f})",
        "less the first's": "" if is_first else f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
        "worst": f"{quality.worst:.2f}",
        "slope": f"{quality.slope:.2f}",
        "flips": f"{quality.flips} of {error.n}",
        "order flips": f"{quality.order_flips} of {2 * error.n}",
    }


@click.command("quality", short_help="margins of quantized files against gold")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--pairs", "suite", required=True, metavar="SUITE:FILE", help="The pairs, as for bench run.")
@click.option("--gold", "gold_path", required=True, type=click.Path(path_type=Path), help="Gold verdicts, JSONL.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--rows", type=click.IntRange(1), default=150, show_default=True, help="Pairs to judge.")
@click.option("--longest", type=click.IntRange(1), metavar="N", help="Only pairs whose prompts have at most N tokens.")
@labels_option
@chat_options
@click.option("--seconds", type=float, metavar="F", help="Stop after this time; the same command goes on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a model instead of the table.")
def command(
    models: tuple[Path, ...],
    suite: str,
    gold_path: Path,
    output: Path,
    rows: int,
    longest: int | None,
    labels: Said | None,
    chat: ChatTemplate,
    seconds: float | None,
    as_json: bool,
) -> None:
    """Judge pairs with each of MODELS (GGUF files) and print how far their margins lie from gold ones."""
    doubled = [name for name, count in Counter(model.stem for model in models).items() if count > 1]
    if doubled:
        raise InputError(f"Two of the files are called {doubled[0]!r}, and a run has its file's name. Rename one.")
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    name, module, path = open_suite(suite)
    gold = read_gold(gold_path)
    chosen = choose_pairs(list(load_pairs(name, module, path, labels=labels)), gold, rows=rows, longest=longest)
    work = Work(name, module, path, chosen, limit=None, labels=labels)
    done = [judge_model(model, work, output / model.stem, deadline=deadline, chat=chat) for model in models]
    if not any(done) and all(not (output / model.stem / ROWS).is_file() for model in models):
        raise InputError("The time was up before the first pair. Give more --seconds.")
    runs = {model: read_run(output / model.stem) for model in models if (output / model.stem / ROWS).is_file()}
    first = next(iter(runs.values()))
    found = [assess(model.stem, model, run, gold, work.pairs, first) for model, run in runs.items()]
    for quality in found if as_json else ():
        say_json(quality.to_json())
    if not as_json:
        say(*markdown_table([table_row(each, is_first=not number) for number, each in enumerate(found)]))
    if not all(done):
        note("The time is up; the same command goes on.")
