"""`gramlite rank`: completions in, their order out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from gramlite.options import JudgeOptions, judge_options, limit_option, output_options
from gramlite.rows.judged_run import JudgedRun, RowsOutput, judge_record

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gramlite.judging.judge import Judge
    from gramlite.ranking.plans import Method
    from gramlite.ranking.rank import KnownComparisons
    from gramlite.rows import Item, Row


def rank_file(options: JudgeOptions, source: str, method: Method, output: RowsOutput, limit: int | None) -> int:
    """Rank the items of a file or of standard input one after the other; returns the exit code."""
    from gramlite.ranking.rank import KnownComparisons
    from gramlite.rows import item_from_json, open_rows, read_lines
    from gramlite.rows.display import Display

    output.prepare([source, *options.inputs()])
    lines, count = open_rows(source, item_from_json)
    total = count if count is None or limit is None else min(count, limit)
    completions: Sequence[str] = ()  # of the item that is shown
    known = KnownComparisons()

    def readable(row: Mapping[str, Any]) -> RenderableType:
        return ranking_table(row, completions)

    with (
        lines,
        options.open() as judge,
        Display(as_json=output.as_json, quiet=output.path is not None, total=total, readable=readable) as display,
        JudgedRun(judge, output, display, ranking_record(judge, method)) as run,
    ):
        for row in islice(read_lines(lines, item_from_json), limit):
            if not run.skips(row.digest):
                completions = row.value.completions if row.value else ()
                run.add(ranked_row(judge, row, method, known))
    return run.finish()


def ranking_record(judge: Judge, method: Method) -> dict[str, Any]:
    """What all rows depend on: besides what a judge's do, the method."""
    return judge_record(judge) | {"settings": judge.settings_record | {"method": method}}


def ranked_row(judge: Judge, row: Row[Item], method: Method, known: KnownComparisons) -> dict[str, Any]:
    """The JSON row of an input line; one that could not be read or ranked has a reason that names its line."""
    from gramlite.ranking.rank import Ranking, rank

    item = row.value
    if item is None:
        ranking = Ranking(
            id=row.id, method=method, ranking=None, reason=row.error, model=judge.model, settings=judge.settings_hash
        )
        return {**ranking.to_json(), "line": row.number, "input": row.digest}
    ranking = rank(judge, prompt=item.prompt, completions=item.completions, method=method, id=item.id, known=known)
    reason = f"line {row.number}: {ranking.reason}" if ranking.ranking is None else ranking.reason
    return {**ranking.to_json(), "reason": reason, "line": row.number, "input": row.digest}


def ranking_table(row: Mapping[str, Any], completions: Sequence[str]) -> RenderableType:
    """A ranked row as a person sees it: place, score, wins and losses, and how each completion begins."""
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
        begins = " ".join(completions[index][:200].split())
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
@limit_option("items")
@output_options("OUT.jsonl", "Write rows to a file.")
def command(options: JudgeOptions, items: str, method: Method, limit: int | None, output: RowsOutput) -> int:
    """Rank the completions of each question, best first.

    Items come as JSON lines with a prompt and a list of completions, from a file or standard input (-).
    """
    return rank_file(options, items, method, output, limit)
