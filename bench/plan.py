"""What a sweep is to do, and what its folder must hold so that it may be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramlite.errors import InputError, IntegrityError
from gramlite.options import JudgeOptions
from gramlite.rows.journal import differences
from gramlite.storage import sha256_cached, write_json

from .suites import takes_labels
from .sweep_result import SweepEntry
from .variants import SweepSource, Variant, parse_types
from .work import SuiteWork, load_work

RECORD = "sweep.json"
LOCK = "sweep.lock"


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is to do: the types, the base first, and the suites by the names of their folders."""

    folder: Path
    source: SweepSource
    variants: Sequence[Variant]
    works: Mapping[str, SuiteWork]
    options: JudgeOptions
    force: bool = False

    def record(self) -> dict[str, Any]:
        """What everything in the folder must have in common."""
        suites = {key: work.to_json() for key, work in self.works.items()}
        return {
            **self.source.record(),
            "settings": judge_settings(self.options),
            "suites": {
                key: {name: suite[name] for name in ("name", "subset", "sha256", "labels")}
                for key, suite in suites.items()
            },
        }


def judge_settings(options: JudgeOptions) -> dict[str, Any]:
    """The judging options that a verdict depends on."""
    names = "template chat_template mode orders votes temperature budget seed delimiters deterministic".split()
    asked = {name: getattr(options, name) for name in names}
    files = {name: Path(asked[name]) for name in names[:2] if asked[name] and Path(asked[name]).is_file()}
    return asked | {name: f"{path} {sha256_cached(path)}" for name, path in files.items()}


def read_plan(*, checkpoint: Path, types: str, suites: Sequence[str], output: Path, **options: Any) -> SweepPlan:
    """The plan that a command line describes; raises InputError before anything is made."""
    variants = parse_types(types)
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is no checkpoint: it holds no config.json. Give a Hugging Face folder.")
    calibration = options["calibration"]
    if calibration is None and (due := next((variant.name for variant in variants if variant.is_calibrated), None)):
        raise InputError(f"{due} is calibrated on judging: add --calibration PAIRS.jsonl, pairs or transcripts.")
    if calibration and not calibration.is_file():
        raise InputError(f"There is no file {calibration}. Give --calibration a JSONL file of pairs or of transcripts.")
    source = SweepSource(
        checkpoint=checkpoint.resolve(), calibration=calibration and calibration.resolve(),
        **{name: options[name] for name in "tokens seed mode template chat threads".split()},
    )  # fmt: skip
    judging = JudgeOptions(
        model=None, adapter=None, temperature=None, delimiters="neutralize", parallel=None,
        chat_template=options["chat"].choice, trust_template=options["chat"].trust,
        **{name: options[name] for name in "template mode orders votes budget seed device threads context deterministic".split()},
    )  # fmt: skip
    samples = read_samples(options["sample"], len(suites))
    explained = [suite for suite in suites if takes_labels(suite)] or suites
    works = [
        load_work(
            suite, options["limit"], sample=count, longest=options["longest"],
            labels=options["labels"] if suite in explained else None,
        )
        for suite, count in zip(suites, samples, strict=True)
    ]  # fmt: skip
    return SweepPlan(output.resolve(), source, variants, name_works(works), judging, options["force"])


def read_samples(text: str | None, suites: int) -> list[int | None]:
    """How many pairs of each suite are drawn; raises InputError for what is no number for all or for each."""
    if text is None:
        return [None] * suites
    counts = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if len(counts) not in (1, suites) or min(counts) < 1:
        raise InputError(f"--sample {text} is neither a number for all suites nor one for each of {suites}.")
    return [*(counts * suites if len(counts) == 1 else counts)]


def name_works(works: Sequence[SuiteWork]) -> dict[str, SuiteWork]:
    """The suites by folder name: the suite's own, with the file's where a suite is there twice."""
    plain = [work.title.replace("/", "-") for work in works]
    named = {
        name if plain.count(name) == 1 else f"{name}-{work.path.name.partition('.')[0]}": work
        for name, work in zip(plain, works, strict=True)
    }
    if len(named) < len(works):
        raise InputError("--suite names the same suite and file name twice.")
    return named


def check_folder(plan: SweepPlan) -> None:
    """Raise IntegrityError where the folder holds a sweep of another checkpoint, other suites or settings."""
    path = plan.folder / RECORD
    if not path.is_file() or plan.force:
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["asked"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}). Choose another -o, or add --force.") from error
    now = plan.record()
    shared = before["suites"].keys() & now["suites"].keys()
    for side in (before, now):
        side["suites"] = {key: side["suites"][key] for key in shared}
    if before["calibration"] is None or now["calibration"] is None:
        before.pop("calibration"), now.pop("calibration")
    if changes := differences(before, now):
        raise IntegrityError(
            f"{plan.folder} holds a sweep that was made differently: {'; '.join(changes)}. "
            "Choose another -o, or add --force to make anew what does not fit."
        )


def write_record(plan: SweepPlan, entries: Sequence[SweepEntry]) -> None:
    """Write what was asked and what became of the types so far."""
    outcomes = [
        {
            "type": entry.name, "bytes": entry.size_bytes, "bits_per_weight": entry.bits_per_weight,
            "runs": {suite: str(run.path.relative_to(plan.folder)) for suite, run in entry.runs.items()},
            "failure": entry.failure,
        }
        for entry in entries
    ]  # fmt: skip
    write_json(plan.folder / RECORD, {"asked": plan.record(), "types": outcomes})
