"""Result tables: columns that know how their figures are written; one table for a terminal, Markdown, CSV or a page."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from gramlite.console import show_table
from gramlite.terminal import visible

from .statistics import Estimate

NONE = "–"
MARKDOWN = re.compile(r"[\\`*_|<>#]|\](?=[(\[:])")

whole, two_digits, three_digits = "{:,.0f}".format, "{:,.2f}".format, "{:.3f}".format

Value = str | float | Estimate | None  # text, a figure, one with its interval, or nothing that is known


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def points(rate: float) -> str:
    """A change in percentage points."""
    return f"{100 * rate:+.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def with_interval(estimate: Estimate, form: Callable[[float], str]) -> str:
    """An estimate with its interval in brackets."""
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]" if estimate.n else NONE


def rate(estimate: Estimate) -> str:
    """A rate in percent with its interval."""
    return with_interval(estimate, percent)


@dataclass(frozen=True)
class Column:
    """A column: its heading with the unit, how a figure is written (None for text), and whether with its interval."""

    heading: str
    form: Callable[[float], str] | None = None
    interval: bool = False

    def text(self, value: Value) -> str:
        """What is shown of a value."""
        if isinstance(value, Estimate) and self.form and self.interval:
            return with_interval(value, self.form)
        figure = value.value if isinstance(value, Estimate) else value
        if figure is None or (isinstance(figure, float) and not math.isfinite(figure)):
            return NONE
        return self.form(figure) if self.form and not isinstance(figure, str) else str(figure)

    def key(self, value: Value) -> str:
        """What a page sorts a value by; empty where a column of figures has none."""
        figure = value.value if isinstance(value, Estimate) else value
        if self.form and (isinstance(figure, str) or figure is None or not math.isfinite(figure)):
            return ""
        return "" if figure is None else str(figure)


@dataclass(frozen=True)
class Table:
    """Rows of values under columns."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]

    def cells(self) -> list[list[tuple[str, str]]]:
        """Each row's values as they are shown, and as they are sorted."""
        return [
            [(column.text(value), column.key(value)) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def texts(self) -> list[dict[str, str]]:
        """Each row as it is shown, by heading."""
        headings = [column.heading for column in self.columns]
        return [dict(zip(headings, (text for text, _ in row), strict=True)) for row in self.cells()]

    def show(self) -> None:
        """Print the table on a terminal."""
        show_table(self.title, self.texts())

    def markdown(self) -> list[str]:
        """The lines of a Markdown table; none for a table without rows."""
        if not self.rows:
            return []
        headings = [escaped(column.heading) for column in self.columns]
        rule = ["---", *["---:"] * (len(headings) - 1)]
        lines = [headings, rule, *([escaped(text) for text, _ in row] for row in self.cells())]
        return [f"| {' | '.join(line)} |" for line in lines]

    def csv(self) -> str:
        """Every figure, nothing rounded; an interval's bounds and its n have columns of their own."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        ends = [("", "_low", "_high", "_n") if column.interval else ("",) for column in self.columns]
        writer.writerow(column.heading + end for column, each in zip(self.columns, ends, strict=True) for end in each)
        for row in self.rows:
            figures = [
                figures_of(value) if column.interval else [plain(value)]
                for column, value in zip(self.columns, row, strict=True)
            ]
            writer.writerow(chain.from_iterable(figures))
        return out.getvalue()


def figures_of(value: Value) -> list[float | None]:
    """An estimate as its value, bounds and n, without what is not known."""
    known = value.to_json() if isinstance(value, Estimate) else {}
    return [known.get(name) for name in ("value", "low", "high", "n")]


def plain(value: Value) -> object:
    """A value as a spreadsheet takes it, text never for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def escaped(text: str) -> str:
    """Text as it is to be read in Markdown, on one line; the brackets of an interval need no escape, a link's do."""
    return MARKDOWN.sub(r"\\\g<0>", visible(" ".join(text.split())))
