"""Judge transcripts as calibration data: the judge's own prompts and what it writes, as token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gramlite.errors import InputError
from gramlite.generation.scaffold import OWN_TEMPLATE, ChatTemplate
from gramlite.judging.pair import Pair

if TYPE_CHECKING:
    from gramlite.generation.decoder import Mode
    from gramlite.judging.judge import Judge
    from gramlite.runtime.options import Device

DEFAULT_TOKENS = 65_536
VERSION = 2  # of transcripts; those of 1, which had none, were tokenized again from the judge's text

CALIBRATION_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice(["think", "direct"]),
        default="think",
        show_default=True,
        help="How pairs are judged for calibration: as the artifact is to judge.",
    ),
    click.option("--tokens", type=int, default=DEFAULT_TOKENS, show_default=True, help="Budget of calibration tokens."),
    click.option("--seed", type=int, default=0, show_default=True, help="Draws the transcripts that fit the budget."),
    click.option("--device", default="auto", show_default=True, help="Where to calibrate: auto, cpu or cuda."),
)


def calibration_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every command that calibrates, which it hands on to `load_calibration`."""
    for option in reversed(CALIBRATION_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True)
class Transcript:
    """One judging: the token ids of the prompt and of all behind it, of which the verdict is the last."""

    prompt_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]
    id: str

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.generated_ids


def load_calibration(
    path: Path,
    *,
    judge: str | Path,
    template: str | None = None,
    chat: ChatTemplate = OWN_TEMPLATE,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    device: Device = "auto",
    mode: Mode = "think",
) -> tuple[list[Transcript], dict[str, Any]]:
    """Calibration transcripts from a file of transcripts or of pairs, and what the manifest says of them.

    Pairs are judged by `judge` on `device` and in an order drawn by `seed`, until the budget of `tokens` is used: in
    think `mode` rationales and all, in direct mode their verdicts alone.
    Raises InputError where the file holds neither, or nothing fits.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}. Give --calibration a JSONL file of pairs or of transcripts.")
    if holds_transcripts(path):
        chosen = choose_transcripts(read_transcripts(path), tokens=tokens, seed=seed)
        return chosen, describe(chosen, tokens=tokens, seed=seed, source=path.name)
    pairs = read_pairs(path)
    random.Random(seed).shuffle(pairs)
    chosen, mode = _judge_pairs(pairs, judge, template, chat, tokens, device, mode)
    return chosen, describe(chosen, tokens=tokens, seed=seed, source=path.name) | {"mode": mode}


def read_transcripts(path: Path) -> list[Transcript]:
    """Read a JSONL file of `version` (2), `prompt_ids`, `generated_ids` and, optionally, `id`.

    Raises InputError that names the line where a row is something else, or a transcript of another version.
    """
    with closing(_filled_lines(path)) as lines:
        return [_parse(line, path, number) for number, line in lines]


def _filled_lines(path: Path) -> Generator[tuple[int, bytes], None, None]:
    """The lines of a file that are not blank, with their numbers."""
    from gramlite.rows import Lines
    from gramlite.rows.lines import whole_lines

    with Lines(path) as lines:
        yield from ((number, line) for number, line in enumerate(whole_lines(lines), 1) if line.strip())


def _parse(line: bytes, path: Path, number: int) -> Transcript:
    try:
        row = json.loads(line)
        prompt, generated = tuple(row["prompt_ids"]), tuple(row["generated_ids"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} line {number} is no transcript: prompt_ids and generated_ids are needed.") from error
    if not prompt or not all(type(token) is int and token >= 0 for token in prompt + generated):
        raise InputError(f"{path} line {number}: ids must be whole numbers, and prompt_ids must not be empty.")
    if row.get("version") != VERSION:
        raise InputError(
            f"{path} line {number} is a transcript of version {row.get('version', 1)}, whose ids need not be the judge's "
            f'own. Calibrate on the pairs again; ids that are exactly what the judge was fed are marked "version": {VERSION}.'
        )
    return Transcript(prompt, generated, str(row.get("id", number)))


def write_transcripts(path: Path, transcripts: Iterable[Transcript]) -> None:
    """Write transcripts as JSONL, for another run to read."""
    with path.open("w", encoding="utf-8") as file:
        for transcript in transcripts:
            row = {"prompt_ids": transcript.prompt_ids, "generated_ids": transcript.generated_ids}
            file.write(json.dumps({"version": VERSION, "id": transcript.id} | row) + "\n")


def choose_transcripts(
    transcripts: Sequence[Transcript], *, tokens: int = DEFAULT_TOKENS, seed: int = 0
) -> list[Transcript]:
    """As many transcripts, in an order drawn by `seed`, as fit into a budget of tokens; none is cut.

    Raises InputError where not even one fits.
    """
    order = list(transcripts)
    random.Random(seed).shuffle(order)
    chosen = list(_within(order, tokens))
    if not chosen:
        raise InputError(f"No transcript fits into --tokens {tokens:,}. Raise it.")
    return chosen


def _within(transcripts: Iterable[Transcript], tokens: int) -> Iterator[Transcript]:
    """The transcripts that fit, until the first that doesn't."""
    for transcript in transcripts:
        tokens -= len(transcript.ids)
        if tokens < 0:
            return
        yield transcript


def record_transcripts(judge: Judge, pairs: Iterable[Pair]) -> Iterator[Transcript]:
    """Let a judge judge pairs and put down, of each order, the token ids that it read, wrote and was made to write.

    Pairs without a verdict, or settled without the model, are left out.
    """
    for verdict in judge.many(pairs):
        for order in verdict.orders:
            if order.verdict in ("A", "B") and order.generated_ids:
                yield Transcript(order.prompt_ids, order.generated_ids, f"{verdict.id}:{order.order}")


def describe(transcripts: Sequence[Transcript], *, tokens: int, seed: int, source: str) -> dict[str, Any]:
    """What a manifest says of calibration data: where it came from, how much, and a hash of the ids in use."""
    digest = hashlib.sha256()
    for transcript in transcripts:
        digest.update(json.dumps([transcript.prompt_ids, transcript.generated_ids]).encode())
    return {
        "source": source,
        "transcripts": len(transcripts),
        "tokens": sum(len(transcript.ids) for transcript in transcripts),
        "token_budget": tokens,
        "seed": seed,
        "sha256": digest.hexdigest(),
    }


def holds_transcripts(path: Path) -> bool:
    """Whether a JSONL file's first row is a transcript; otherwise its rows should be pairs."""
    with closing(_filled_lines(path)) as lines:
        _, first = next(lines, (0, b""))
    return b'"prompt_ids"' in first


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a JSONL file; raises InputError where a row is none."""
    from gramlite.rows import Lines, read_rows

    with Lines(path) as stream:
        rows = list(read_rows(stream))
    for row in rows:
        if row.value is None:
            raise InputError(f"{path}: {row.error}")
    return [row.value for row in rows if row.value is not None]


def _judge_pairs(
    pairs: list[Pair],
    model: str | Path,
    template: str | None,
    chat: ChatTemplate,
    tokens: int,
    device: Device,
    mode: Mode,
) -> tuple[list[Transcript], Mode]:
    from gramlite.judging.judge import Settings
    from gramlite.loading import load
    from gramlite.runtime.options import RuntimeOptions

    runtime = RuntimeOptions(device=device)
    with load(
        model,
        template=template,
        settings=Settings(mode=mode, orders="ab"),
        runtime=runtime,
        chat_template=chat.choice,
        trust_template=chat.trust,
    ) as judge:
        chosen = list(_within(record_transcripts(judge, pairs), tokens))
    if not chosen:
        raise InputError(f"No pair's transcript fits into --tokens {tokens:,}. Raise it, or give other pairs.")
    return chosen, mode if judge.template.form.thinks else "direct"
