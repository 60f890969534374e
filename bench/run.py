"""`gramlite bench run`: judge a suite into a run folder that survives a kill and is gone on with.

The rows lie in a journal (see `gramlite.rows.journal`): each is on disk before the next is begun. Besides what
`gramlite judge` writes, a row has the pair's `label`, its `meta` with the subset, and `seconds`: the
wall-clock time since the row before it, whose mean over the rows is the time a pair takes, however many are
decoded together.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, InputError
from gramlite.judging.pair import Pair, Verdict
from gramlite.options import JudgeOptions, judge_options, labels_option
from gramlite.rows import identifier_text
from gramlite.rows.journal import Journal
from gramlite.storage import sha256_cached, write_json
from gramlite.terminal import say, say_json, visible

from .folder import RECORD, ROWS, RUN_VERSION, check_run_folder, read_run
from .suites import Said, Suite, load_pairs, open_suite, suite_names

if TYPE_CHECKING:
    from gramlite.judging.judge import Judge

PACKAGES = (
    "numpy", "llama-cpp-python", "onnxruntime-genai", "onnxruntime", "torch", "transformers", "tokenizers",
    "bitsandbytes", "gptqmodel",
)  # fmt: skip

HELP = (
    "Judge a benchmark into a run folder and score it officially.\n\n"
    f"The suites are {', '.join(suite_names())}; your own pairs are pairs:FILE. SUITE/SUBSET keeps one subset, or all "
    "whose names begin with it (rmbench/safety). Without a file, the suite's own is looked for in the folder "
    "GRAMLITE_BENCHMARKS."
)


class Shows(Protocol):
    """Whoever is shown rows as they are judged."""

    def show(self, row: Mapping[str, Any], verdict: Verdict | None) -> None: ...


@dataclass(frozen=True)
class Work:
    """A suite that is to be judged: its name, module, file and pairs, how these were chosen and labels explained."""

    name: str
    module: Suite
    path: Path
    pairs: Sequence[Pair]
    limit: int | None
    sample: int | None = None
    longest: int | None = None
    subset: str | None = None
    labels: Said | None = None

    @property
    def title(self) -> str:
        """The suite as it is typed, without its file."""
        return f"{self.name}/{self.subset}" if self.subset else self.name

    def to_json(self) -> dict[str, Any]:
        """What run.json says of the suite; `pairs_sha256` covers the pairs that were judged."""
        return {
            "name": self.name,
            "path": str(self.path.resolve()),
            "sha256": None if self.path.is_dir() else sha256_cached(self.path),
            "subset": self.subset,
            "limit": self.limit,
            "sample": self.sample,
            "longest": self.longest,
            "labels": self.labels,
            "pairs": len(self.pairs),
            "pairs_sha256": hashlib.sha256("".join(map(pair_digest, self.pairs)).encode()).hexdigest(),
        }


def load_work(
    specification: str, limit: int | None = None, *, sample: int | None = None, longest: int | None = None,
    labels: Said | None = None,
) -> Work:  # fmt: skip
    """The pairs of `SUITE[/SUBSET][:FILE]`: all, the first `limit`, or `sample` drawn by a hash of their ids.

    Only pairs of at most `longest` characters count; `labels` says what labels of one's own pairs mean. The larger of
    two samples holds the smaller. Raises InputError for a suite or subset without such pairs, or with an id that is
    there twice.
    """
    if limit and sample:
        raise InputError("--limit takes the first pairs and --sample draws some. Give one of them.")
    suite, colon, file = specification.partition(":")
    suite, slash, subset = suite.partition("/")
    name, module, path = open_suite(suite + colon + file)
    pairs = list(load_pairs(name, module, path, limit=None if subset or sample or longest else limit, labels=labels))
    if slash:
        pairs = of_subset(pairs, subset, specification)
    if longest:
        long = {item_of(pair) for pair in pairs if length_of(pair) > longest}
        pairs = [pair for pair in pairs if item_of(pair) not in long]
    if not pairs:
        short = f" of at most {longest:,} characters" if longest else ""
        raise InputError(f"{path} holds no pair{short} for the suite {name}. {module.SOURCE}")
    counts = Counter(identifier_text(pair.id) for pair in pairs)
    doubled = [identifier for identifier, count in counts.items() if count > 1]
    if doubled:
        raise InputError(f"{path} holds the id {doubled[0]!r} more than once. Make ids unique.")
    if subset or sample or longest:
        pairs = chosen_pairs(pairs, limit=limit, sample=sample)
    return Work(name, module, path, pairs, limit, sample, longest, subset or None, labels)


def item_of(pair: Pair) -> str:
    """What pairs that are scored together share, as the nine of an RM-Bench item do."""
    return str((pair.meta or {}).get("item") or identifier_text(pair.id))


def length_of(pair: Pair) -> int:
    """The characters of a pair."""
    return len(pair.prompt) + len(pair.response_a) + len(pair.response_b)


def of_subset(pairs: Sequence[Pair], subset: str, specification: str) -> list[Pair]:
    """The pairs of a subset, or of all whose names begin with its name and a hyphen; letter case does not matter."""
    wanted = subset.casefold()
    names = {str((pair.meta or {}).get("subset")) for pair in pairs}
    kept = {name for name in names if name.casefold() == wanted or name.casefold().startswith(f"{wanted}-")}
    if not kept:
        raise InputError(f"{specification} has no subset {subset!r}. It has: {', '.join(sorted(names))}.")
    return [pair for pair in pairs if (pair.meta or {}).get("subset") in kept]


def chosen_pairs(pairs: Sequence[Pair], *, limit: int | None, sample: int | None) -> list[Pair]:
    """The first `limit` pairs or a `sample` of them, in their order; of pairs that form one item, all or none."""
    items: dict[str, list[Pair]] = {}
    for pair in pairs:
        items.setdefault(item_of(pair), []).append(pair)
    order = sorted(items, key=lambda item: hashlib.sha256(item.encode()).digest()) if sample else list(items)
    room = sample or limit or len(pairs)
    kept: set[str] = set()
    for item in order:
        if kept and len(items[item]) > room:
            break
        room -= len(items[item])
        kept.add(item)
        if room <= 0:
            break
    return [pair for item, members in items.items() if item in kept for pair in members]


def pair_digest(pair: Pair) -> str:
    """16 hexadecimal digits of all that a pair's row depends on."""
    text = json.dumps([identifier_text(pair.id), pair.prompt, pair.response_a, pair.response_b, pair.label])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_suite(
    judge: Judge, work: Work, folder: Path, *, display: Shows, resume: bool = False, force: bool = False,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge what is not judged yet and return the finished run.json.

    `about` is added to run.json (what the model's file is, how it was run). Raises IntegrityError when the
    folder was made with another model, other settings or another suite, and InputError when it is there and
    neither `resume` nor `force` is given.
    """
    record = {
        "settings_hash": judge.settings_hash, "settings": judge.settings_record, "model": judge.model,
        "suite": {key: work.to_json()[key] for key in ("name", "sha256", "labels")},
    }  # fmt: skip
    started = now()
    check_run_folder(folder, resume=resume, force=force)
    with Journal(folder / ROWS, record=record, resume=resume, force=force) as journal:
        kept = sum(journal.kept.values())
        about = {"name": folder.name, **describe_run(judge, work), **(about or {}), "started": started}
        write_json(folder / RECORD, {**about, "finished": None})
        began = time.perf_counter()
        for row, verdict in judged_rows(judge, work.pairs, journal.kept):
            journal.append(row)
            display.show(row, verdict)
        seconds = time.perf_counter() - began
    return finish(folder, work, {**about, "finished": now(), "seconds": round(seconds, 3), "kept": kept})


def judged_rows(
    judge: Judge, pairs: Iterable[Pair], kept: Mapping[str, int]
) -> Iterator[tuple[dict[str, Any], Verdict]]:
    """The rows of the pairs that are not kept, in order."""
    todo = [pair for pair in pairs if not kept.get(pair_digest(pair))]
    last = time.perf_counter()
    for pair, verdict in zip(todo, judge.many(todo), strict=True):
        current = time.perf_counter()
        row = {**verdict.to_json(), "label": pair.label, "meta": dict(pair.meta or {}), "input": pair_digest(pair)}
        yield {**row, "seconds": round(current - last, 4)}, verdict
        last = time.perf_counter()


def finish(folder: Path, work: Work, record: Mapping[str, Any]) -> dict[str, Any]:
    """Score the rows and write the finished run.json."""
    rows = [row for row in read_run(folder).rows.values() if row.get("input")]
    wanted = {pair_digest(pair) for pair in work.pairs}
    rows = [row for row in rows if row["input"] in wanted]
    complete = {
        **record,
        "rows": len(rows),
        "no_verdict": sum(row["verdict"] is None for row in rows),
        "seconds_per_pair": sum(row["seconds"] for row in rows) / len(rows) if rows else None,
        "score": {"suite": work.name, **work.module.score(rows, work.pairs)},
    }
    write_json(folder / RECORD, complete)
    return complete


def describe_run(judge: Judge, work: Work) -> dict[str, Any]:
    """Suite, settings, model, versions and hardware."""
    return {
        "run_version": RUN_VERSION,
        "suite": work.to_json(),
        "settings": judge.settings_record,
        "settings_hash": judge.settings_hash,
        "model": dict(judge.model),
        "versions": versions(),
        "hardware": {**hardware(), "device": judge.backend.device},
    }


def describe_artifact(path: Path) -> dict[str, Any]:
    """What run.json says of the model's file: path, size in bytes and the manifest, where there is one."""
    from gramlite.formats.artifact import artifact_bytes, read_manifest

    manifest = read_manifest(path)
    return {
        "path": str(path.resolve()),
        "bytes": artifact_bytes(path),
        "manifest": asdict(manifest) if manifest else None,
    }


def versions() -> dict[str, str]:
    """The versions of Python, gramlite and the packages that a verdict may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("gramlite", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor, the physical and the logical cores that may be used, the memory in GB and the operating system."""
    import psutil

    from gramlite.runtime.device import thread_count, usable_cores

    return {
        "cpu": processor_name(),
        "cores": thread_count(None),
        "threads": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def model_path(options: JudgeOptions) -> Path:
    """The model's file or folder; without one, the reference judge's."""
    if options.model is not None:
        return Path(options.model)
    from gramlite.reference.files import cached_gguf

    return cached_gguf()


def print_score(folder: Path, record: Mapping[str, Any], *, as_json: bool) -> None:
    """The score on standard output."""
    score = record["score"]
    if as_json or not sys.stdout.isatty():
        summary = {key: record[key] for key in ("name", "rows", "no_verdict", "seconds", "seconds_per_pair", "score")}
        say_json({"run": str(folder), **summary})
        return
    for name, value in score["scores"].items():
        shown = "–" if value is None else f"{100 * value:.2f} %"
        say(f"{visible(name):<40} {shown}{'  *' if name == score['headline'] else ''}")
    say(
        f"n = {score['n']:,}, without a verdict {score['no_verdict']:,}, not judged {score['missing']:,}",
        *score["notes"],
    )


@click.command(help=HELP)
@click.argument("suite", metavar="SUITE[/SUBSET][:FILE]")
@judge_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="RUN_FOLDER", help="Where to.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Judge the first N pairs only.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Judge N pairs drawn by a hash of their ids.")
@click.option("--longest", type=click.IntRange(1), metavar="N", help="Leave out pairs of more than N characters.")
@labels_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, or with a larger --limit.")
@click.option("--force", is_flag=True, help="Start an existing run anew.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal.")
def command(
    options: JudgeOptions,
    suite: str,
    output: Path,
    limit: int | None,
    sample: int | None,
    longest: int | None,
    labels: Said | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Judge a suite and print its score."""
    from gramlite.rows.display import Display
    from gramlite.rows.judged_run import say_rows_on_interrupt

    say_rows_on_interrupt(output / ROWS, output)
    work = load_work(suite, limit, sample=sample, longest=longest, labels=labels)
    check_run_folder(
        output, [work.path if work.path.is_file() else None, *options.inputs()], resume=resume, force=force
    )
    path = model_path(options)
    with ExitStack() as stack:
        judge = stack.enter_context(options.open())
        display = stack.enter_context(Display(as_json=as_json, quiet=True, total=len(work.pairs)))
        about = {"model": {**judge.model, **describe_artifact(path)}, "deterministic": options.deterministic}
        record = run_suite(judge, work, output, display=display, resume=resume, force=force, about=about)
        display.close()
    print_score(output, record, as_json=as_json)
    return SOME_ROWS_WITHOUT_VERDICT if record["no_verdict"] else 0
