"""`gramlite judge`: pairs in, verdicts out."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import islice
from typing import TYPE_CHECKING

import click

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, InputError
from gramlite.options import JudgeOptions, judge_options, limit_option, output_options
from gramlite.rows.judged_run import JudgedRun, RowsOutput
from gramlite.terminal import note

if TYPE_CHECKING:
    from gramlite.judging.pair import Pair


def judge_file(options: JudgeOptions, source: str, output: RowsOutput, limit: int | None) -> int:
    """Judge the pairs of a file or of standard input; returns the exit code."""
    from gramlite.rows import open_rows, pair_from_json, read_rows
    from gramlite.rows.display import Display

    output.prepare([source, *options.inputs()])
    lines, count = open_rows(source, pair_from_json)
    total = count if count is None or limit is None else min(count, limit)
    with (
        lines,
        options.open() as judge,
        Display(as_json=output.as_json, quiet=output.path is not None, total=total) as display,
        JudgedRun(judge, output, display) as run,
    ):
        run.judge_pairs(islice(read_rows(lines), limit), lookahead=count is not None)
    return run.finish()


def judge_pair(options: JudgeOptions, pair: Pair, output: RowsOutput) -> int:
    """Judge one pair, its rationale shown as it is written; returns the exit code."""
    from gramlite.rows.display import Display

    pair.check()
    output.prepare(options.inputs())
    texts = {"prompt": pair.prompt, "response_a": pair.response_a, "response_b": pair.response_b}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]  # that of the line that a file would have
    with (
        options.open() as judge,
        Display(as_json=output.as_json) as display,
        JudgedRun(judge, output, display) as run,
    ):
        if run.skips(digest):
            note(f"The verdict on this pair is in {output.path} from before.")
            return 0
        verdict = judge(**texts, on_text=display.listener)
        run.add({**verdict.to_json(), "line": 1, "input": digest}, verdict)
    return 0 if verdict.winner else SOME_ROWS_WITHOUT_VERDICT


@click.command(context_settings={"show_default": False})
@click.argument("pairs", required=False, metavar="[PAIRS.jsonl | -]")
@click.option("--prompt", metavar="T", help="The question of one pair.")
@click.option("--a", "response_a", metavar="T", help="Its first response.")
@click.option("--b", "response_b", metavar="T", help="Its second response.")
@judge_options
@limit_option("pairs")
@output_options("OUT.jsonl", "Write rows to a file.")
def command(
    options: JudgeOptions,
    pairs: str | None,
    prompt: str | None,
    response_a: str | None,
    response_b: str | None,
    limit: int | None,
    output: RowsOutput,
) -> int:
    """Judge which response of each pair is better.

    Pairs come as JSON lines from a file or standard input (-), or one from --prompt, --a and --b.
    """
    from gramlite.judging.pair import Pair

    given = [text for text in (prompt, response_a, response_b) if text is not None]
    if given and (pairs or len(given) < 3):
        raise InputError("Give a file of pairs, or all three of --prompt, --a and --b.")
    if given:  # which is UTF-8 whatever the locale says
        prompt, response_a, response_b = (os.fsencode(text).decode("utf-8", "surrogateescape") for text in given)
        return judge_pair(options, Pair(prompt, response_a, response_b), output)
    if not pairs:
        raise InputError("Nothing to judge. Give PAIRS.jsonl, - for standard input, or --prompt T --a T --b T.")
    return judge_file(options, pairs, output, limit)
