"""The report: one HTML file that needs nothing else, with the same tables as Markdown and CSV beside it.

Everything that a model or a data set wrote is hostile text: it enters the page escaped in HTML, or inside a
JSON block in which no character can end the block, and is shown by the page's script as text only. The
page's policy forbids any request and any script but its own. Its frame, style and script are in the folder `page`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gramlite.errors import GramliteError
from gramlite.storage import Inputs, atomic_output, check_file, check_note
from gramlite.terminal import visible

from .comparison import RunComparison
from .flips import embedded, flip_data, pair_texts
from .folder import Run
from .picture import Panel, inline_svg, panels_of, write_pictures
from .summary import figures_table, markdown, sentences, subset_table, summary_table
from .table import Column, Table

LARGEST_PAGE = 2_800_000
TEXT_LIMITS = (20_000, 8_000, 4_000, 2_000, 1_000, 500, 200)
FLIP_LIMITS = (1_000_000, 1_000, 500, 250, 120, 60, 30)
BESIDE = (".md", ".csv", ".png", ".svg")
MADE = '<h2 id="made">Made with</h2>'  # by which a page is known as a report
PAGE = Path(__file__).with_name("page")
MADE_WITH = ("run", "format", "type", "sha256", "settings", "versions", "machine")


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


def write_report(path: Path, base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison]) -> list[Path]:
    """Write `OUT.html` and beside it `OUT.md`, `OUT.csv`, `OUT.png` and `OUT.svg`; returns what was written."""
    check_report(path)
    report, *beside = report_files(path)
    panels = panels_of(base, runs, comparisons)
    texts = {
        report: render(base, runs, comparisons, panels),
        beside[0]: markdown(base, runs, comparisons),
        beside[1]: figures_table(comparisons).csv(),
    }
    for destination, text in texts.items():
        with atomic_output(destination, force=True) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return [*texts, *write_pictures(beside[2:], panels)]


def render(base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison], panels: Sequence[Panel]) -> str:
    """The page, below three million bytes: long texts are shortened, then the list of flips, and it says so."""
    pairs = pair_texts([base, *runs])
    contents = page_contents(base, runs, comparisons, panels)
    for texts, flips in zip(TEXT_LIMITS, FLIP_LIMITS, strict=True):
        data = flip_data(base, runs, pairs, text_limit=texts, flip_limit=flips)
        document = render_page(**contents, data=Markup(embedded(data)))
        if len(document.encode("utf-8", "backslashreplace")) <= LARGEST_PAGE:
            return document
    raise GramliteError("The report would be larger than 3 MB. Compare fewer runs at once.")


def render_page(**contents: object) -> str:
    """The page's template with its style and its script; what is no Markup is made visible and escaped."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (PAGE / "report.css").read_text(encoding="utf-8")
    template = environment.get_template("report.html.j2")
    return template.render(**contents, script=Markup(script), style=Markup(style), digest=Markup(digest)) + "\n"


def page_contents(
    base: Run, runs: Sequence[Run], comparisons: Sequence[RunComparison], panels: Sequence[Panel]
) -> dict[str, Any]:
    """What the page shows beside the flips."""
    return {
        "title": f"{len(runs)} runs against {base.name}" if len(runs) != 1 else f"{runs[0].name} against {base.name}",
        "suite": str(base.suite.get("name") or (runs[0].suite.get("name") if runs else "") or ""),
        "common": f"{comparisons[0].counts['common'] if comparisons else 0:,}",
        "pictures": [Markup(inline_svg(panel)) for panel in panels],
        "summary": summary_table(base, runs, comparisons),
        "runs": [
            {"name": each.run, "said": [*sentences(each), *each.notes], "subsets": subset_table(each)}
            for each in comparisons
        ],
        "made_with": made_with([base, *runs]),
        "seeds": ", ".join(sorted({str(comparison.seed) for comparison in comparisons})),
    }


def made_with(runs: Sequence[Run]) -> Table:
    """What the figures were made with: models, settings, versions and machines of each run."""
    rows = []
    for run in runs:
        record, model = run.record, run.model
        versions = ", ".join(f"{k} {v}" for k, v in (record.get("versions") or {}).items())
        hardware = ", ".join(f"{k} {v}" for k, v in (record.get("hardware") or {}).items() if v)
        settings = ", ".join(_setting(k, v) for k, v in (record.get("settings") or {}).items() if v is not None)
        known = [run.name, model.get("format"), model.get("quantization"), str(model.get("sha256") or "")[:16]]
        rows.append([str(value) if value else None for value in (*known, settings, versions, hardware)])
    return Table("Made with", [Column(name) for name in MADE_WITH], rows)


def _setting(name: str, value: object) -> str:
    """A setting in words; of the nested ones the name is enough."""
    return f"{name} {value.get('name', '…')}" if isinstance(value, dict) else f"{name} {value}"
