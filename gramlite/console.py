"""Tables, columns and progress bars for people: the one place where rich is set up, and all text in it is literal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from .terminal import bars, visible

Advance = Callable[[str, int], None]  # is told what is worked on and how many bytes of it were done


def console(*, stderr: bool = False) -> Console:
    """A console without markup, emoji names and highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def literal(text: str | Text) -> Text:
    """A text as it is to be read; what is made as rich's Text already has its style and was made visible."""
    return text if isinstance(text, Text) else Text(visible(text))


def table(title: str, rows: Sequence[Mapping[str, str | Text]], *, left: int = 1) -> Table:
    """A table of rows with the same columns, of which the first `left` are aligned to the left."""
    made = Table(title=literal(title), title_justify="left")
    for position, heading in enumerate(rows[0]):
        made.add_column(literal(heading), justify="left" if position < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(literal, row.values()))
    return made


def show_table(title: str, rows: Sequence[Mapping[str, str]], *, left: int = 1) -> None:
    """Print a table; one that is too wide, and wider than it is long, is turned so that its rows are columns."""
    out, made = console(), table(title, rows, left=left)
    heading, *names = rows[0]
    if len(rows) < len(names) and out.measure(made, options=out.options.update(max_width=1000)).maximum > out.width:
        made = table(title, [{"": name} | {row[heading]: row[name] for row in rows} for name in names])
    out.print(made)


def show_facts(rows: Sequence[Sequence[str | Text]]) -> None:
    """Print rows in columns; the last is never wrapped, so that a command or a path in it can be copied."""
    cells = [[literal(cell) for cell in row] for row in rows]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)][:-1]
    out = console()
    for *columns, last in cells:
        for cell, width in zip(columns, widths, strict=True):
            cell.pad_right(width - cell.cell_len + 2)
        out.print(Text.assemble(*columns, last), soft_wrap=True)


class Words(ProgressColumn):
    """A text with a task's values in it, as in `{task.description}`."""

    def __init__(self, template: str = "{task.description}") -> None:
        super().__init__(Column(no_wrap=True))
        self._template = template

    def render(self, task: Task) -> Text:
        return literal(self._template.format(task=task))


class RateColumn(ProgressColumn):
    """Rows a second, or seconds a row where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def progress(*columns: ProgressColumn, on: Console | None = None) -> Iterator[Progress]:
    """A progress bar on standard error, or on the console where results appear above it; only on a terminal.

    Without `columns` it has a count, a rate and an estimate.
    """
    columns = columns or (
        Words(),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        Words("left"),
        TimeRemainingColumn(),
    )
    on = on or console(stderr=True)
    with Progress(*columns, console=on, transient=True, disable=not sys.stderr.isatty()) as bar:
        if bar.disable:
            yield bar
            return
        bars.append(on)
        try:
            yield bar
        finally:
            bars.remove(on)


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Advance]:
    """A bar of bytes on stderr, on a terminal only; the yielded function takes a tensor's name and the bytes done of it."""
    columns = (
        Words("{task.description:28.28}"),
        BarColumn(bar_width=16),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True),
    )
    with progress(*columns) as bar:
        task = bar.add_task("", total=total_bytes)

        def advance(name: str, done: int) -> None:
            bar.update(task, advance=done, description=name)

        yield advance
