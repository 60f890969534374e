"""The report: one HTML file that needs nothing else, with the same tables as Markdown and CSV beside it.

Everything that a model or a data set wrote is hostile text: it enters the page escaped in HTML, or inside a
JSON block in which no character can end the block, and is shown by the page's script as text only. The
page's policy forbids any request and any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from html import escape as escape_markup
from pathlib import Path

from gramlite.errors import GramliteError
from gramlite.storage import Inputs, atomic_output, check_file, check_note
from gramlite.terminal import visible

from . import page
from .compare import Comparison
from .flips import embedded, flip_data, pair_texts
from .folder import Run
from .picture import Panel, inline_svg, panels_of, write_pictures
from .statistics import Estimate
from .tables import csv_table, markdown, p_value, percent, sentences

LARGEST_PAGE = 2_800_000
TEXT_LIMITS = (20_000, 8_000, 4_000, 2_000, 1_000, 500, 200)
BESIDE = (".md", ".csv", ".png", ".svg")
MADE = '<h2 id="made">Made with</h2>'  # by which a page is known as a report
FLIP_LIMITS = (1_000_000, 1_000, 500, 250, 120, 60, 30)


def escape(text: str) -> str:
    """Text as it is to be read in HTML, in an element or an attribute."""
    return escape_markup(visible(text))


Cell = tuple[str, float | str | None]  # what is shown, and what it is sorted by


def report_files(path: Path) -> tuple[Path, ...]:
    """`OUT.html`, and what is written beside it."""
    report = path if path.suffix == ".html" else path.with_name(f"{path.name}.html")
    return (report, *(report.with_suffix(ending) for ending in BESIDE))


def check_report(path: Path, inputs: Inputs = ()) -> None:
    """Raise InputError, before anything is computed, unless a report may be written there or is there already."""
    report, *beside = report_files(path)
    if path.exists() and not path.is_dir():
        check_file(path)  # which says that it is a pipe or a device, by the name that was given
    check_note(report, inputs, MADE)
    for each in beside:
        check_note(each, inputs, "" if report.exists() else None)


def write_report(path: Path, base: Run, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Path]:
    """Write `OUT.html` and beside it `OUT.md`, `OUT.csv`, `OUT.png` and `OUT.svg`; returns what was written."""
    check_report(path)
    report, *beside = report_files(path)
    panels = panels_of(base, runs, comparisons)
    by_name = {run.name: run for run in runs}
    texts = {
        report: render(base, runs, comparisons, panels),
        beside[0]: markdown(base, comparisons, by_name),
        beside[1]: csv_table(comparisons),
    }
    for destination, text in texts.items():
        with atomic_output(destination, force=True) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return [*texts, *write_pictures(beside[2:], panels)]


def render(base: Run, runs: Sequence[Run], comparisons: Sequence[Comparison], panels: Sequence[Panel]) -> str:
    """The page, below three million bytes: long texts are shortened, then the list of flips, and it says so."""
    pairs = pair_texts([base, *runs])
    before, after = _frame(base, runs, comparisons, panels)
    for texts, flips in zip(TEXT_LIMITS, FLIP_LIMITS, strict=True):
        data = flip_data(base, runs, pairs, text_limit=texts, flip_limit=flips)
        document = before + embedded(data) + after
        if len(document.encode("utf-8", "backslashreplace")) <= LARGEST_PAGE:
            return document
    raise GramliteError("The report would be larger than 3 MB. Compare fewer runs at once.")


# --- the page ------------------------------------------------------------------------------------------------


def _frame(
    base: Run, runs: Sequence[Run], comparisons: Sequence[Comparison], panels: Sequence[Panel]
) -> tuple[str, str]:
    """The page before and after the flips."""
    digest = base64.b64encode(hashlib.sha256(page.SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    )
    title = f"{len(runs)} runs against {base.name}" if len(runs) != 1 else f"{runs[0].name} against {base.name}"
    suite = str(base.suite.get("name") or (runs[0].suite.get("name") if runs else "") or "")
    common = comparisons[0].counts["common"] if comparisons else 0
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{page.STYLE}</style></head>\n"
    )
    sections = (
        _pictures(panels)
        + _table(base, runs, comparisons)
        + _flips()
        + _each_run(comparisons)
        + _made_with(base, runs, comparisons)
    )
    body = (
        '<body><a class="skip" href="#table">Skip to the table</a>\n'
        f'<header><div><h1>{escape(title)}</h1><p class="quiet">{escape(suite)} · {common:,} pairs in common</p></div>\n'
        '<button id="theme" type="button">Light or dark</button></header>\n<main>\n'
        f"{sections}</main>\n<footer>Changes are run minus base. Brackets hold 95 % intervals. Detectable is the smallest true "
        "accuracy difference that McNemar's exact test finds with 80 % power.</footer>\n"
    )
    before = f'{head}{body}<script type="application/json" id="data">'
    return before, f"</script>\n<script>{page.SCRIPT}</script>\n</body></html>\n"


def _each_run(comparisons: Sequence[Comparison]) -> str:
    """What is said of each run, and its subsets; folded, unless there is only one."""
    parts = ['<section aria-labelledby="each"><h2 id="each">Run by run</h2>\n']
    for comparison in comparisons:
        said = "".join(f"<li>{escape(line)}</li>" for line in (*sentences(comparison), *comparison.notes))
        subsets = html_table(subset_cells(comparison), f"{comparison.run} by subset")
        opened = " open" if len(comparisons) == 1 else ""
        parts.append(
            f"<details{opened}><summary><strong>{escape(comparison.run)}</strong></summary><ul>{said}</ul>\n"
            f"{subsets}</details>\n"
        )
    return "".join(parts) + "</section>\n"


def _pictures(panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    drawn = "".join(f"<figure>{inline_svg(panel)}</figure>\n" for panel in panels)
    return (
        f'<section aria-labelledby="trade"><h2 id="trade">The trade-off</h2>\n<div class="pictures">{drawn}</div>\n'
        '<p class="quiet">Filled and joined: the Pareto front, which no model beats in both. The diamond is the base. '
        "Bars are 95 % intervals; in accuracy, of the change from the base.</p></section>\n"
    )


def _table(base: Run, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    table = html_table(comparison_cells(base, runs, comparisons), "The comparison")
    return f'<section aria-labelledby="table"><h2 id="table">The comparison</h2>\n{table}</section>\n'


def comparison_cells(base: Run, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[dict[str, Cell]]:
    """The comparison table, the base first, each cell with what it is sorted by."""
    rows = [_base_cells(base, comparisons[0])] if comparisons else []
    for run, comparison in zip(runs, comparisons, strict=True):
        measured = comparison.measures
        rows.append({
            "model": (run.name, run.name),
            "size MB": _plain_cell(None if run.size_bytes is None else run.size_bytes / 1e6, 1),
            "s/pair": _plain_cell(run.seconds_per_pair, 2),
            "accuracy %": rate_cell(measured["accuracy"].run),
            "Δ accuracy": change_cell(measured["accuracy"].change),
            "p": (p_value(comparison.p), comparison.p) if comparison.counts["labelled"] else ("–", None),
            "flips %": rate_cell(measured["flips"].change, interval=True),
            "right → wrong": (str(comparison.table["lost"]), comparison.table["lost"]),
            "wrong → right": (str(comparison.table["gained"]), comparison.table["gained"]),
            "mean |Δ margin|": _plain_cell(measured["margin"].change.value, 3),
            "KL": _plain_cell(measured["divergence"].change.value, 3),
            "consistent %": rate_cell(measured["consistency"].run),
            "first shown %": rate_cell(measured["first_position"].run),
            "rationale tokens": _plain_cell(_value(measured["rationale"].run), 0),
            "cut off %": rate_cell(measured["forced"].run),
            "no verdict": (str(comparison.counts["run_no_verdict"]), comparison.counts["run_no_verdict"]),
            "detectable": (percent(comparison.detectable), comparison.detectable),
            "n": (f"{comparison.counts['judged']:,}", comparison.counts["judged"]),
        })  # fmt: skip
    return rows


def _base_cells(base: Run, comparison: Comparison) -> dict[str, Cell]:
    measured, nothing = comparison.measures, ("", None)
    return {
        "model": (f"{base.name} (base)", base.name),
        "size MB": _plain_cell(None if base.size_bytes is None else base.size_bytes / 1e6, 1),
        "s/pair": _plain_cell(base.seconds_per_pair, 2),
        "accuracy %": rate_cell(measured["accuracy"].base),
        "Δ accuracy": nothing, "p": nothing, "flips %": nothing, "right → wrong": nothing, "wrong → right": nothing,
        "mean |Δ margin|": nothing, "KL": nothing,
        "consistent %": rate_cell(measured["consistency"].base),
        "first shown %": rate_cell(measured["first_position"].base),
        "rationale tokens": _plain_cell(_value(measured["rationale"].base), 0),
        "cut off %": rate_cell(measured["forced"].base),
        "no verdict": (str(comparison.counts["base_no_verdict"]), comparison.counts["base_no_verdict"]),
        "detectable": nothing, "n": nothing,
    }  # fmt: skip


def subset_cells(comparison: Comparison) -> list[dict[str, Cell]]:
    return [
        {
            "subset": (subset.name, subset.name),
            "rows": (f"{subset.rows:,}", subset.rows),
            "Δ accuracy": change_cell(subset.accuracy),
            "flips %": rate_cell(subset.flips, interval=True),
            "p": (p_value(subset.p), subset.p),
            "p (Holm)": (p_value(subset.p_holm), subset.p_holm),
        }
        for subset in comparison.subsets
    ]


def _value(estimate: Estimate | None) -> float | None:
    return estimate.value if estimate and estimate.n else None


def _plain_cell(value: float | None, digits: int) -> Cell:
    return ("–", None) if value is None or not math.isfinite(value) else (f"{value:,.{digits}f}", value)


def rate_cell(estimate: Estimate | None, *, interval: bool = False) -> Cell:
    if not estimate or not estimate.n:
        return "–", None
    bounds = f" [{percent(estimate.low)}, {percent(estimate.high)}]" if interval else ""
    return percent(estimate.value) + bounds, estimate.value


def change_cell(estimate: Estimate) -> Cell:
    if not estimate.n:
        return "–", None
    low, high = (f"{100 * bound:+.1f}" for bound in (estimate.low, estimate.high))
    return f"{100 * estimate.value:+.1f} [{low}, {high}]", estimate.value


def html_table(rows: Sequence[Mapping[str, Cell]], label: str) -> str:
    """A sortable table in a frame that scrolls by itself, also with the keyboard."""
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>' for name in rows[0]
    )
    lines = "".join("<tr>" + "".join(map(_cell, row.values())) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table></div>\n"
    )


def _cell(cell: Cell) -> str:
    shown, key = cell
    return f'<td data-value="{"" if key is None else escape(str(key))}">{escape(shown)}</td>'


def _flips() -> str:
    return (
        f'<section aria-labelledby="flips"><h2 id="flips">Verdicts that changed</h2>\n{page.FLIP_BROWSER}</section>\n'
    )


def _setting(name: str, value: object) -> str:
    """A setting in words; of the nested ones the name is enough."""
    return f"{name} {value.get('name', '…')}" if isinstance(value, dict) else f"{name} {value}"


def _made_with(base: Run, runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """What the figures were made with: models, settings, versions and machines of each run."""
    rows: list[dict[str, Cell]] = []
    for run in (base, *runs):
        record, model = run.record, run.model
        versions = ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
        hardware = ", ".join(f"{k} {v}" for k, v in (record.get("hardware") or {}).items() if v)
        settings = ", ".join(_setting(k, v) for k, v in (record.get("settings") or {}).items() if v is not None)
        fields = {
            "run": run.name, "format": model.get("format"), "type": model.get("quantization"),
            "sha256": str(model.get("sha256") or "")[:16], "settings": settings, "versions": versions,
            "machine": hardware,
        }  # fmt: skip
        rows.append({name: (str(value or "–"), str(value or "")) for name, value in fields.items()})
    seeds = ", ".join(sorted({str(comparison.seed) for comparison in comparisons}))
    return (
        f'<section aria-labelledby="made">{MADE}\n{html_table(rows, "Made with")}'
        f'<p class="quiet">Seed of the bootstrap: {escape(seeds)}.</p></section>\n'
    )
