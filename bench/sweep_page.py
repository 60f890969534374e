"""A sweep's page: its results in Markdown, what they mean, and what they were measured with."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from urllib.parse import quote

from gramlite.storage import Inputs, check_note
from gramlite.terminal import visible

from .picture import panels_of, write_pictures
from .plan import SweepPlan
from .sweep_result import SweepResult
from .sweep_table import tables_markdown, write_text
from .sweep_words import what_it_says
from .table import escaped

MADE = "This page is written by the command"  # by which it is known again


def check_page(path: Path, inputs: Inputs) -> None:
    """Raise InputError unless a page and its picture may be written there, or are there already."""
    check_note(path, inputs, MADE)
    check_note(path.with_suffix(".svg"), inputs, "" if path.exists() else None)


def write_page(path: Path, plan: SweepPlan, swept: SweepResult) -> None:
    """Write the results as a page in Markdown, with the trade-off picture beside it."""
    suite = next(iter(swept.comparisons))
    base, *runs = swept.runs_of(suite).values()
    comparisons = [swept.comparisons[suite][run.name] for run in runs]
    panels = [panel for panel in panels_of(base, runs, comparisons) if panel.key.endswith("-size")]
    pictures = write_pictures([path.with_suffix(".svg")], panels)
    lines = [
        f"# What quantization cost {escaped(plan.source.checkpoint.name)}",
        "",
        f"Every type against {escaped(swept.base.name)}, pair by pair. {settings_sentence(plan)} Brackets hold 95 % intervals; "
        "Δ is type minus base in percentage points; margins are log-odds in nats. "
        f"{MADE} at its end; nothing in it is typed by hand.",
        "",
        "## What it says",
        "",
        *(f"- {escaped(said)}" for said in what_it_says(swept)),
        "",
        *(f"![{escaped(panels[0].describe())}]({quote(picture.name)})\n" for picture in pictures),
        *tables_markdown(swept),
        "## Made with",
        "",
        *made_with(plan, swept),
    ]
    write_text(path, "\n".join(lines) + "\n")


def settings_sentence(plan: SweepPlan) -> str:
    """How the pairs are judged, and what the types that are calibrated are calibrated on."""
    mode = {"direct": "Direct mode, one forward pass a verdict", "think": "Think mode, a rationale before each verdict"}
    orders = "both orders of each pair" if plan.options.orders == "both" else "each pair as given only"
    said = f"{mode[plan.options.mode]}, {orders}."
    if plan.source.calibration is None or not any(variant.is_calibrated for variant in plan.variants):
        return said
    how = plan.source.calibration_mode
    return f"{said} Calibrated on {f'judging in {how} mode' if how else 'transcripts as they were recorded'}."


def made_with(plan: SweepPlan, swept: SweepResult) -> list[str]:
    """The machine, the versions, the suites, the calibration and the command, as a list."""
    record = next(iter(swept.base.runs.values())).record
    lines = [
        f"- Machine: {escaped(', '.join(f'{key} {value}' for key, value in (record.get('hardware') or {}).items() if value))}.",
        f"- Versions: {escaped(', '.join(f'{key} {value}' for key, value in (record.get('versions') or {}).items()))}.",
        f"- Checkpoint: {escaped(plan.source.checkpoint.name)}, sha256 over its files {plan.source.checkpoint_sha256[:16]}….",
    ]
    for key, work in plan.works.items():
        about = work.to_json()
        chosen = f"the first {work.limit}" if work.limit else "drawn by a hash of their ids" if work.sample else "all"
        if work.longest:
            chosen += f", of those of at most {work.longest:,} characters"
        lines.append(
            f"- {escaped(key)}: {len(work.pairs):,} pairs ({chosen}) of a file with sha256 {str(about['sha256'])[:16]}…."
        )
    runs = swept.runs_of(next(iter(plan.works)))
    for variant in plan.variants:
        if variant.path and variant.name in runs:
            sha256 = str(runs[variant.name].model.get("sha256"))[:16]
            lines.append(f"- {escaped(variant.name)}: a model that was there already, sha256 {sha256}….")
    calibration = plan.source.record()["calibration"]
    if calibration and any(variant.is_calibrated for variant in plan.variants):
        lines.append(
            f"- Calibration: at most {calibration['tokens']:,} tokens of the judge's own transcripts of {escaped(calibration['name'])} "
            f"(sha256 {calibration['sha256'][:16]}…), seed {calibration['seed']}."
        )
    lines += ["- Seconds a pair are wall-clock times of this run; other work on the machine shows in them.", ""]
    return [*lines, "```", visible(shlex.join(["gramlite", *sys.argv[1:]])), "```"]
