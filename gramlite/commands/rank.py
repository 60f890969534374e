"""`gramlite rank`: completions in, their order out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, InputError
from gramlite.options import JudgeOptions, judge_options

from .judge import open_input, say_rows_on_interrupt

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gramlite.judging.judge import Judge
    from gramlite.ranking.plans import Method
    from gramlite.rows import Item, Line
    from gramlite.rows.display import Display
    from gramlite.rows.journal import Journal


def rank_lines(
    judge: Judge,
    lines: Iterable[Line[Item]],
    method: Method,
    display: Display,
    journal: Journal | None,
    table: RankingTable,
) -> Counter[str]:
    """Rank the items one after the other and emit one row each; returns how many ended in which way."""
    from gramlite.ranking.rank import KnownComparisons

    todo = Counter(journal.kept) if journal else Counter()
    known = KnownComparisons()
    tally: Counter[str] = Counter()
    for line in lines:
        if todo[line.digest] > 0:
            todo[line.digest] -= 1
            tally["kept"] += 1
            display.advance()
            continue
        row = ranked_row(judge, line, method, known)
        if journal:
            journal.append(row)
        table.completions = line.value.completions if line.value else ()
        display.show(row, None)
        tally["judged" if row["verdict"] is not None else "without verdict"] += 1
    return tally


def ranked_row(judge: Judge, line: Line[Item], method: Method, known: Any) -> dict[str, Any]:
    """The JSON row of an input line; one that could not be read or ranked has a reason that names its line."""
    from gramlite.ranking.rank import Ranking, rank

    item = line.value
    if item is None:
        ranking = Ranking(
            id=line.id, method=method, ranking=None, reason=line.error, model=judge.model,
            settings=judge.settings_hash,
        )  # fmt: skip
        return {**ranking.to_json(), "line": line.number, "input": line.digest}
    ranking = rank(judge, prompt=item.prompt, completions=item.completions, method=method, id=item.id, known=known)
    reason = f"line {line.number}: {ranking.reason}" if ranking.ranking is None else ranking.reason
    return {**ranking.to_json(), "reason": reason, "line": line.number, "input": line.digest}


class RankingTable:
    """Shows a ranked row to a person: place, score, wins and losses, and how each of `completions` begins."""

    def __init__(self) -> None:
        self.completions: Sequence[str] = ()

    def __call__(self, row: Mapping[str, Any]) -> RenderableType:
        from rich import box
        from rich.text import Text

        from gramlite.console import table
        from gramlite.rows.display import row_name
        from gramlite.terminal import visible

        name = visible(row_name(row))[:40]
        if row["ranking"] is None:
            return Text(f"{name:<40} - {visible(str(row['reason']))}", style="red")
        won, lost = _record(row)
        rows = []
        for place, index in enumerate(row["ranking"], 1):
            figures = {"place": str(place), "index": str(index)}
            if row["scores"]:
                figures["score"] = f"{row['scores'][index]:+.2f} ± {row['standard_errors'][index]:.2f}"
            begins = " ".join(self.completions[index][:200].split())
            rows.append(figures | {"won": str(won[index]), "lost": str(lost[index]), "completion": begins})
        made = table(name, rows, left=0)
        made.title_style, made.box, made.caption, made.caption_justify = "bold", box.SIMPLE_HEAD, _caption(row), "left"
        completion = made.columns[-1]
        completion.justify, completion.no_wrap, completion.overflow = "left", True, "ellipsis"
        return made


def _record(row: Mapping[str, Any]) -> tuple[Counter[int], Counter[int]]:
    """How often each completion won and lost."""
    decided = [made for made in row["comparisons"] if made["winner"] is not None]
    won = Counter(made["winner"] for made in decided)
    return won, Counter(sum(made["pair"]) - made["winner"] for made in decided)


def _caption(row: Mapping[str, Any]) -> str:
    circles = [" > ".join(map(str, (*circle, circle[0]))) for circle in row["cycles"][:5]]
    more = f", and {len(row['cycles']) - 5} more" if len(row["cycles"]) > 5 else ""
    return f"Circles: {'; '.join(circles)}{more}" if circles else ""


def run_file(
    options: JudgeOptions, source: str, method: Method, output: Path | None, resume: bool, force: bool, as_json: bool
) -> int:
    """Rank a file or standard input; returns the exit code."""
    from gramlite.rows import item_from_json, read_lines
    from gramlite.rows.display import Display
    from gramlite.rows.journal import Journal, check_rows

    if output:
        check_rows(output, [source, *options.inputs()], resume=resume, force=force)
    stream, lines, _ = open_input(source, item_from_json)
    with ExitStack() as stack:
        stack.callback(stream.close)
        judge = stack.enter_context(options.open())
        journal = None
        if output:
            settings = judge.settings_record | {"method": method}
            record = {"settings_hash": judge.settings_hash, "settings": settings, "model": judge.model}
            journal = stack.enter_context(Journal(output, record=record, resume=resume, force=force))
        table = RankingTable()
        display = stack.enter_context(Display(as_json=as_json, quiet=output is not None, total=lines, readable=table))
        tally = rank_lines(judge, read_lines(stream, item_from_json), method, display, journal, table)
        display.summary(tally, output)
    return SOME_ROWS_WITHOUT_VERDICT if tally["without verdict"] else 0


@click.command(context_settings={"show_default": False})
@click.argument("items", metavar="ITEMS.jsonl | -")
@click.option(
    "--method",
    type=click.Choice(["best", "tournament", "full"]),
    default="best",
    show_default=True,
    help="Find the best in n-1 comparisons, sort with few, or compare all pairs for scores.",
)
@judge_options
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT.jsonl", help="Write rows to a file.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted -o file.")
@click.option("--force", is_flag=True, help="Start an existing -o file anew.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal.")
def command(
    options: JudgeOptions, items: str, method: Method, output: Path | None, resume: bool, force: bool, as_json: bool
) -> int:
    """Rank the completions of each question, best first.

    Items come as JSON lines with a prompt and a list of completions, from a file or standard input (-).
    """
    if resume and not output:
        raise InputError("--resume goes on with an output file; add -o OUT.jsonl.")
    say_rows_on_interrupt(output)
    return run_file(options, items, method, output, resume, force, as_json)
