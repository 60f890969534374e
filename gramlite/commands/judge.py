"""`gramlite judge`: pairs in, verdicts out, each row on disk before the next is begun."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, InputError
from gramlite.interrupt import how_to_go_on, say_on_interrupt
from gramlite.options import JudgeOptions, judge_options
from gramlite.rows.journal import begun_here, rows_kept
from gramlite.terminal import note

if TYPE_CHECKING:
    from gramlite.judging.judge import Judge
    from gramlite.judging.pair import Pair, Verdict
    from gramlite.rows import Lines, Row
    from gramlite.rows.display import Display
    from gramlite.rows.journal import Journal


def judge_one(judge: Judge, pair: Pair, display: Display, journal: Journal | None) -> int:
    """Judge the pair given by options, its rationale shown as it is written; returns the exit code."""
    digest = digest_of(pair)
    if journal and journal.kept[digest]:
        note(f"The verdict on this pair is in {journal.path} from before.")
        return 0
    verdict = judge(
        prompt=pair.prompt, response_a=pair.response_a, response_b=pair.response_b, on_text=display.listener
    )
    row = {**verdict.to_json(), "line": 1, "input": digest}
    if journal:
        journal.append(row)
    display.show(row, verdict)
    return 0 if verdict.winner else SOME_ROWS_WITHOUT_VERDICT


def digest_of(pair: Pair) -> str:
    """The digest of a pair given by options, by which its row is known: that of the line that a file would have."""
    line = {"prompt": pair.prompt, "response_a": pair.response_a, "response_b": pair.response_b}
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()[:16]


def judge_rows(
    judge: Judge, rows: Iterable[Row], display: Display, journal: Journal | None, *, lookahead: bool
) -> Counter[str]:
    """Judge rows in input order and emit one output row each; returns how many ended in which way."""
    todo = Counter(journal.kept) if journal else Counter()
    waiting: list[Row] = []  # rows read and not yet emitted, in input order
    tally: Counter[str] = Counter()

    def emit(row: Row, verdict: Verdict | None) -> None:
        output = output_row(judge, row, verdict)
        if journal:
            journal.append(output)
        display.show(output, verdict)
        tally["judged" if output["verdict"] else "without verdict"] += 1

    def emit_errors() -> None:
        while waiting and waiting[0].pair is None:
            emit(waiting.pop(0), None)

    def pairs() -> Iterator[Pair]:
        for row in rows:
            if todo[row.digest] > 0:
                todo[row.digest] -= 1
                tally["kept"] += 1
                display.advance()
                continue
            waiting.append(row)
            if row.pair is not None:
                yield row.pair
            elif len(waiting) == 1:
                emit_errors()

    for verdict in judge.many(pairs(), lookahead=lookahead):
        emit_errors()
        emit(waiting.pop(0), verdict)
        emit_errors()
    emit_errors()
    return tally


def output_row(judge: Judge, row: Row, verdict: Verdict | None) -> dict[str, Any]:
    """The JSON row of an input row; a row that could not be read or judged has a reason that names its line."""
    if verdict is not None:
        output = verdict.to_json()
        if verdict.winner is None:
            output["reason"] = f"line {row.line}: {verdict.reason}"
    else:
        output = {
            "id": row.id, "verdict": None, "p_a": None, "margin": None, "consistent": None, "reason": row.error,
            "flags": [], "sections": None, "orders": [], "model": judge.model, "settings": judge.settings_hash,
        }  # fmt: skip
    return {**output, "line": row.line, "input": row.digest}


def open_input(
    source: str, build: Callable[[Mapping[str, Any], str], object] | None = None
) -> tuple[Lines, int | None, bool]:
    """The input, its number of rows where it can be counted, and whether reading ahead is harmless.

    Raises InputError, before a model is loaded, for a file that `build` (a pair's, unless given) can make no row of.
    """
    from gramlite.rows import Lines, check_kind, pair_from_json

    path = Path(source)
    if source != "-" and not path.exists():
        raise InputError(f"There is no file {path}. Give a JSONL file of pairs, or - for standard input.")
    if source == "-" or not path.is_file():
        return Lines(source), None, False
    with Lines(path) as lines:
        count = check_kind(lines, build or pair_from_json)
    return Lines(path), count, True


def say_rows_on_interrupt(rows: Path | None, folder: Path | None = None) -> None:
    """Let an interrupt say how many rows are in a journal, or in its `folder`, and what to type to go on."""

    def words() -> str:
        if rows is None:
            return "Nothing was saved."
        return f"{rows_kept(rows)} rows are in {folder or rows}. {how_to_go_on(begun=begun_here(rows))}"

    say_on_interrupt(words)


def run_file(options: JudgeOptions, source: str, output: Path | None, resume: bool, force: bool, as_json: bool) -> int:
    """Judge a file or standard input; returns the exit code."""
    from gramlite.rows import read_rows
    from gramlite.rows.display import Display
    from gramlite.rows.journal import Journal, check_rows

    if output:
        check_rows(output, [source, *options.inputs()], resume=resume, force=force)
    stream, lines, lookahead = open_input(source)
    with ExitStack() as stack:
        stack.callback(stream.close)
        judge = stack.enter_context(options.open())
        record = {"settings_hash": judge.settings_hash, "settings": judge.settings_record, "model": judge.model}
        journal = None
        if output:
            journal = stack.enter_context(Journal(output, record=record, resume=resume, force=force))
        display = stack.enter_context(Display(as_json=as_json, quiet=output is not None, total=lines))
        tally = judge_rows(judge, read_rows(stream), display, journal, lookahead=lookahead)
        display.summary(tally, output)
    return SOME_ROWS_WITHOUT_VERDICT if tally["without verdict"] else 0


@click.command(context_settings={"show_default": False})
@click.argument("pairs", required=False, metavar="[PAIRS.jsonl | -]")
@click.option("--prompt", metavar="T", help="The question of one pair.")
@click.option("--a", "response_a", metavar="T", help="Its first response.")
@click.option("--b", "response_b", metavar="T", help="Its second response.")
@judge_options
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT.jsonl", help="Write rows to a file.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted -o file.")
@click.option("--force", is_flag=True, help="Start an existing -o file anew.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, also on a terminal.")
def command(
    options: JudgeOptions,
    pairs: str | None,
    prompt: str | None,
    response_a: str | None,
    response_b: str | None,
    output: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Judge which response of each pair is better.

    Pairs come as JSON lines from a file or standard input (-), or one from --prompt, --a and --b.
    """
    from gramlite.judging.pair import Pair

    given = [text is not None for text in (prompt, response_a, response_b)]
    if any(given) and (pairs or not all(given)):
        raise InputError("Give a file of pairs, or all three of --prompt, --a and --b.")
    if resume and not output:
        raise InputError("--resume goes on with an output file; add -o OUT.jsonl.")
    say_rows_on_interrupt(output)
    if not any(given):
        if not pairs:
            raise InputError("Nothing to judge. Give PAIRS.jsonl, - for standard input, or --prompt T --a T --b T.")
        return run_file(options, pairs, output, resume, force, as_json)
    pair = Pair(utf8(prompt), utf8(response_a), utf8(response_b))
    return run_pair(options, pair, output, resume, force, as_json)


def utf8(argument: str | None) -> str:
    """A text from the command line, which is UTF-8 whatever the locale says."""
    return os.fsencode(argument or "").decode("utf-8", "surrogateescape")


def run_pair(options: JudgeOptions, pair: Pair, output: Path | None, resume: bool, force: bool, as_json: bool) -> int:
    """Judge the one pair given by options; returns the exit code."""
    from gramlite.rows.display import Display
    from gramlite.rows.journal import Journal, check_rows

    pair.check()
    if output:
        check_rows(output, options.inputs(), resume=resume, force=force)
    with ExitStack() as stack:
        judge = stack.enter_context(options.open())
        journal = None
        if output:
            record = {"settings_hash": judge.settings_hash, "settings": judge.settings_record, "model": judge.model}
            journal = stack.enter_context(Journal(output, record=record, resume=resume, force=force))
        display = stack.enter_context(Display(as_json=as_json, quiet=False, total=None))
        return judge_one(judge, pair, display, journal)
