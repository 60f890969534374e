"""What a student learns from its teacher: a prompt's answers, up to the verdict, and what the teacher makes of them.

A lesson is one prompt with the answers that a judge may give to it: a rationale, and direct mode's scaffold. Several
lessons are run as one sequence in which no answer and no prompt sees another, so that what they have in common is
computed once: a prompt for all its answers, the instructions and the question for both orders of a pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gramlite.errors import InputError
from gramlite.prompt import common_prefix

from .calibration import Transcript

if TYPE_CHECKING:
    import torch

SHEET_TOKENS = 1024  # in one sequence; a lesson that is longer stands alone
TOP = 64  # likeliest tokens at each position that are kept of the teacher; all others are one


@dataclass(frozen=True)
class Answer:
    """Token ids that lead up to the verdict, without it; `spoken` are those of a rationale, free to be otherwise."""

    ids: tuple[int, ...]
    spoken: bool


@dataclass(frozen=True)
class Lesson:
    """A prompt and its answers, at least one."""

    id: str
    prompt_ids: tuple[int, ...]
    answers: tuple[Answer, ...]

    @property
    def pair(self) -> str:
        """What both orders of a pair have in common."""
        name, colon, order = self.id.rpartition(":")
        return name if colon and order in ("ab", "ba") else self.id

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(answer.ids) for answer in self.answers)

    @property
    def spoken(self) -> int:
        """How many tokens its rationales have."""
        return sum(len(answer.ids) for answer in self.answers if answer.spoken)


@dataclass(frozen=True)
class Target:
    """What the teacher says: a margin an answer, at each spoken position the TOP likeliest tokens, and its states.

    `margins` [answers]; `tokens` [positions, TOP]; `shares` [positions, TOP + 1] their log-probabilities and, last,
    that of all others together, nats, float32; `states` [tokens - 1, width] behind the final norm, of all tokens but
    the first, bfloat16.
    """

    margins: torch.Tensor
    tokens: torch.Tensor
    shares: torch.Tensor
    states: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """What a model makes of one lesson: margins [answers], logits where its rationales are foretold
    [spoken, vocabulary], and states [tokens - 1, width] behind the final norm, of all tokens but the first; float32."""

    margins: torch.Tensor
    logits: torch.Tensor
    states: torch.Tensor


def make_lessons(
    transcripts: Sequence[Transcript], direct: tuple[int, ...] | None, *, rationales: bool = True
) -> list[Lesson]:
    """A lesson a prompt: what the transcript says, and direct mode's scaffold `direct` where that is known.

    Raises InputError where nothing remains to be learnt from a transcript.
    """
    lessons = []
    for transcript in transcripts:
        said = transcript.generated_ids[:-1]
        answers = [Answer(direct, spoken=False)] if direct is not None else []
        if transcript.generated_ids and said != direct and rationales:
            answers.append(Answer(said, spoken=bool(said)))
        if not answers:
            raise InputError(
                f"Transcript {transcript.id} has nothing to learn from. Name the judge's --template, or give transcripts with rationales."
            )
        lessons.append(Lesson(transcript.id, transcript.prompt_ids, tuple(answers)))
    return lessons


def hold_back(lessons: Sequence[Lesson], share: float, seed: int) -> tuple[list[Lesson], list[Lesson]]:
    """Lessons to learn from and lessons to be tested on, the orders of a pair together.

    Raises InputError where there are not at least two pairs.
    """
    pairs = sorted({lesson.pair for lesson in lessons})
    if len(pairs) < 2:
        raise InputError("At least two pairs are needed, one to learn from and one to be tested on. Give more.")
    random.Random(seed).shuffle(pairs)
    tested = set(pairs[: min(max(1, round(share * len(pairs))), len(pairs) - 1)])
    return [one for one in lessons if one.pair not in tested], [one for one in lessons if one.pair in tested]


def sheets(lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
    """Lessons in runs that are computed as one sequence: neighbours, as many as SHEET_TOKENS has room for."""
    sheet: list[Lesson] = []
    used = 0
    for lesson in lessons:
        needed = lesson.tokens - (common_prefix(sheet[-1].prompt_ids, lesson.prompt_ids) if sheet else 0)
        if sheet and used + needed > SHEET_TOKENS:
            yield sheet
            sheet, used, needed = [], 0, lesson.tokens
        sheet.append(lesson)
        used += needed
    if sheet:
        yield sheet


Path = tuple[tuple[int, int], ...]  # the stretches of a sheet's rows that a token sees before it


class _Layout:
    """Lessons as one sequence: what a prompt has in common with the one before it stands there once."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.spoken: list[int] = []  # rows at which the rationales' tokens are foretold
        self.verdicts: list[int] = []  # rows at which the verdicts are
        self.rows: list[list[int]] = []  # of each lesson's tokens
        self._stretches: list[Path] = []
        before: tuple[tuple[int, ...], Path] = ((), ())
        for lesson in lessons:
            known = _first(before[1], common_prefix(before[0], lesson.prompt_ids))
            prompt = self._add(lesson.prompt_ids[_length(known) :], known)
            before = lesson.prompt_ids, prompt
            self.rows.append([row for stretch in prompt for row in range(*stretch)])
            for answer in lesson.answers:
                path = self._add(answer.ids, prompt)
                self.verdicts.append(path[-1][1] - 1)
                self.rows[-1] += range(path[-1][1] - len(answer.ids), path[-1][1])
                if answer.spoken:
                    self.spoken += [prompt[-1][1] - 1, *range(path[-1][0], path[-1][1] - 1)]

    def _add(self, ids: Sequence[int], path: Path) -> Path:
        """Put tokens behind a path; return the path that ends in them."""
        if not ids:
            return path
        start, seen = len(self.ids), _length(path)
        self.ids += ids
        self.positions += range(seen, seen + len(ids))
        whole = (*path, (start, len(self.ids)))
        self._stretches.append(whole)
        return whole

    def inputs(self, device: Any) -> dict[str, Any]:
        """The model's inputs, for a batch of one; where paths part, with positions and a mask."""
        import torch

        ids = torch.tensor([self.ids], device=device)
        if self.positions == list(range(len(self.ids))):
            return {"input_ids": ids}
        seen = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool, device=device)
        for *before, (start, stop) in self._stretches:
            for first, last in before:
                seen[start:stop, first:last] = True
            seen[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril_()
        positions = torch.tensor([self.positions], device=device)
        return {"input_ids": ids, "position_ids": positions, "attention_mask": seen[None, None]}


def _length(path: Path) -> int:
    return sum(stop - start for start, stop in path)


def _first(path: Path, count: int) -> Path:
    """The first tokens of a path."""
    kept = []
    for start, stop in path:
        if count > 0:
            kept.append((start, min(stop, start + count)))
        count -= stop - start
    return tuple(kept)


def read(model: Any, lessons: Sequence[Lesson], choices: tuple[int, int]) -> list[Reading]:
    """What a model makes of each lesson of a sheet.

    The head is computed only where rationales are foretold, and at verdicts for the two choices only.
    """
    layout = _Layout(lessons)
    states = model.model(**layout.inputs(model.device), use_cache=False).last_hidden_state[0]
    head = model.lm_head.weight
    margins = (states[layout.verdicts] @ (head[choices[0]] - head[choices[1]])).float()
    logits = model.lm_head(states[layout.spoken]).float()
    return [
        Reading(own_margins, own_logits, states[rows[1:]].float())
        for own_margins, own_logits, rows in zip(
            margins.split([len(lesson.answers) for lesson in lessons]),
            logits.split([lesson.spoken for lesson in lessons]),
            layout.rows,
            strict=True,
        )
    ]


def ask_teacher(model: Any, lessons: Sequence[Lesson], choices: tuple[int, int]) -> list[Target]:
    """The targets of a sheet's lessons, on the CPU."""
    import torch

    targets = []
    with torch.no_grad():
        for reading in read(model, lessons, choices):
            logits = reading.logits
            shares, tokens = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1] - 1))
            states = reading.states.bfloat16().cpu()
            targets.append(Target(reading.margins.cpu(), tokens.int().cpu(), _with_rest(shares).cpu(), states))
    return targets


def state_error(states: torch.Tensor, target: Target) -> torch.Tensor:
    """The mean over tokens of the squared distance of states from the teacher's, as a share of theirs."""
    wanted = target.states.to(states.device).float()
    return ((states - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


def divergence(logits: torch.Tensor, target: Target) -> torch.Tensor:
    """The mean divergence KL(teacher || student) over spoken positions, in nats; tokens that are not among the
    teacher's likeliest count as one."""
    tokens, shares = target.tokens.to(logits.device).long(), target.shares.to(logits.device)
    own = _with_rest(logits.log_softmax(-1).gather(-1, tokens))
    return (shares.exp() * (shares - own)).sum(-1).mean()


def _with_rest(shares: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, and last that of all others."""
    import torch

    rest = (1 - shares.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([shares, rest], -1)
