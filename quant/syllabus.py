"""Where lessons come from: transcripts, pairs that the teacher judges, or pairs asked in direct mode alone."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gramlite.export.checkpoint import open_checkpoint

from gramlite.decoding import choice_tokens
from gramlite.errors import InputError, ModelError
from gramlite.model_folder import read_model_folder
from gramlite.pair import Order, Pair
from gramlite.prompt import encode_prompt, encode_trusted
from gramlite.scaffold import scaffold_for
from gramlite.storage import atomic_output, sha256_cached, sha256_file
from gramlite.template import presented, resolve_template, screen

from .calibration import (
    Transcript,
    describe,
    holds_transcripts,
    load_calibration,
    read_pairs,
    read_transcripts,
    write_transcripts,
)
from .lessons import Lesson, make_lessons
from .sensitivity import verdict_tokens

logger = logging.getLogger("gramlite")

ORDERS: tuple[Order, ...] = ("ab", "ba")


@dataclass(frozen=True)
class Syllabus:
    """Lessons, the two verdict tokens, and what a manifest says of where the lessons came from."""

    lessons: tuple[Lesson, ...]
    choices: tuple[int, int]
    described: dict[str, Any]


def load_syllabus(
    calibration: Path,
    teacher: Path,
    *,
    template: dict[str, Any] | None,
    mode: Literal["think", "direct"] = "think",
    tokens: int,
    seed: int = 0,
    choice: str | None = None,
    keep: Path | None = None,
) -> Syllabus:
    """Lessons from a file of transcripts or of pairs.

    Every prompt is asked in direct mode, and with `think` it is also answered with a rationale, which the teacher
    writes where the file holds pairs. `template` describes the judge's (without one only transcripts' own answers are
    learnt), `choice` is the template's name or file as the user gave it. What the teacher writes is kept in the folder
    `keep`, so that it need not write it twice.
    Raises InputError for a file that holds nothing usable, ModelError for a teacher that is no judge.
    """
    language = _Language(teacher, template) if template else None
    if not calibration.is_file():
        raise InputError(f"There is no file {calibration}. Give --calibration a JSONL file of pairs or of transcripts.")
    if mode == "direct" and not holds_transcripts(calibration):
        if language is None:
            raise ModelError(f"No judge template was found for {teacher}. Name it with --template.")
        pairs = read_pairs(calibration)
        random.Random(seed).shuffle(pairs)
        chosen = list(language.prompts(pairs, tokens))
        if not chosen:
            raise InputError(f"No pair of {calibration} fits into --tokens {tokens:,} and the context. Raise it.")
    else:
        chosen = _transcripts(calibration, teacher, template, tokens, seed, choice, keep)
    described = describe(chosen, tokens=tokens, seed=seed, source=calibration.name)
    if language is None:
        logger.warning("No judge template is known, so direct mode is not trained for. Name it with --template.")
        choices, direct = verdict_tokens(chosen), None
    else:
        choices, direct = language.choices, language.direct
        _check_verdicts(chosen, choices)
    lessons = make_lessons(chosen, direct, rationales=mode == "think")
    return Syllabus(tuple(lessons), choices, described | {"mode": mode, "direct": direct is not None})


def _transcripts(
    calibration: Path,
    teacher: Path,
    template: dict[str, Any] | None,
    tokens: int,
    seed: int,
    choice: str | None,
    keep: Path | None,
) -> list[Transcript]:
    """A file's transcripts, or those that the teacher writes for its pairs, from `keep` where they are there."""
    kept = None
    if keep and not holds_transcripts(calibration):
        files = [sha256_file(calibration), *(sha256_cached(file) for file in open_checkpoint(teacher).files)]
        origin = json.dumps([files, tokens, seed, template and template.get("sha256")])
        kept = keep / f"transcripts-{hashlib.sha256(origin.encode()).hexdigest()[:12]}.jsonl"
        if kept.is_file():
            return read_transcripts(kept)
    chosen, _ = load_calibration(calibration, judge=teacher, template=choice, tokens=tokens, seed=seed)
    if kept:
        with atomic_output(kept) as temporary:
            write_transcripts(temporary, chosen)
    return chosen


def _check_verdicts(transcripts: Sequence[Transcript], choices: tuple[int, int]) -> None:
    for transcript in transcripts:
        if transcript.generated_ids and transcript.generated_ids[-1] not in choices:
            raise InputError(
                f"Transcript {transcript.id} ends in token {transcript.generated_ids[-1]}, which is none of the "
                f"template's verdicts {choices}. Name the judge's own --template."
            )


class _Language:
    """How a judge is asked: its tokenizer, its template and its chat scaffold, read without its weights."""

    def __init__(self, teacher: Path, template: dict[str, Any]) -> None:
        from gramlite.tokenizer_json import read_vocabulary  # which needs the tokenizers package

        folder = read_model_folder(teacher)
        self.context = folder.context
        self.vocabulary = read_vocabulary(folder, folder.count("vocab_size"))
        self.template = resolve_template(None, template, teacher)
        form = self.template.form
        self.scaffold = scaffold_for(folder.chat_template, thinks=form.thinks)
        self.direct = tuple(encode_trusted(self.vocabulary, form.direct))
        try:
            self.choices = choice_tokens(self.vocabulary, form)
        except ValueError as error:
            raise ModelError(
                f"{teacher} cannot be a judge with the template {self.template.name!r}: {error}."
            ) from error

    def prompts(self, pairs: Sequence[Pair], tokens: int) -> Iterator[Transcript]:
        """Both orders of each pair as prompts without an answer, within a budget of tokens.

        Pairs that exceed the context, and pairs of one and the same response, are left out.
        """
        for number, pair in enumerate(pairs):
            shown, _ = screen(self.template, pair, "neutralize")
            prompts = []
            for order in ORDERS:
                segments = self.scaffold.wrap(self.template.segments(presented(shown, order)))
                ids = encode_prompt(self.vocabulary, segments).tokens
                prompts.append(Transcript(ids, (), f"{pair.id or number}:{order}"))
            longest = max(len(prompt.ids) for prompt in prompts) + len(self.direct)
            if longest > self.context or pair.response_a == pair.response_b:
                continue
            tokens -= sum(len(prompt.ids) for prompt in prompts)
            if tokens < 0:
                return
            yield from prompts
