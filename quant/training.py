"""Trains a student on lessons by AdamW, held to its teacher's margins and rationales, and can go on after any stop."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramlite.export.save_tensors import save_tensors

from gramlite.errors import IntegrityError, ModelError
from gramlite.storage import atomic_output

from .lessons import Lesson, Target, divergence, read, sheets, state_error
from .trainable import Student

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
FIRST_DECAY, SECOND_DECAY, SMALL = 0.9, 0.95, 1e-12
LAST_RATE = 0.05  # the share of the learning rate that is left at the end
WARM_STEPS = 4
SAVE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train. `rate` is the first step's size, as a share of each scale; `batch` lessons make a step.

    A lesson's loss is its mean Huber loss of margin differences (quadratic within 1 nat), times `margin_weight`, plus
    the mean divergence over its rationale's tokens, plus the last states' relative error over all tokens, times
    `state_weight`: margins are few and each a single number, states say at every token what got lost.
    `held_back` is the share of pairs that is only tested on; training ends when `patience` epochs in a row were no
    better on them than the best before.
    """

    epochs: int = 4
    rate: float = 2e-5
    batch: int = 8
    margin_weight: float = 1.0
    state_weight: float = 5.0
    decay: float = 0.0
    norms: bool = False
    held_back: float = 0.2
    patience: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Means over lessons: the loss, |margin - teacher's| in nats, the divergence of rationales in nats a token, and
    the relative squared error of the last states."""

    loss: float
    margin_error: float
    divergence: float
    state_error: float


@dataclass
class TrainingState:
    """Where training stands; `best` are the logarithms of the lowest loss so far on the lessons held back."""

    logarithms: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    best: torch.Tensor
    step: int = 0
    learnt: float = 0.0  # loss on the lessons of this epoch so far, summed
    history: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = True  # whether the tensors are all of one step

    @property
    def best_epoch(self) -> float:
        return float(best_of(self.history)["epoch"])

    def update(self, rate: float, decay: float) -> None:
        """One step of AdamW (Loshchilov and Hutter, 1711.05101) against the logarithms' gradient."""
        gradient, number = self.logarithms.grad, self.step + 1
        assert gradient is not None
        self.first.lerp_(gradient, 1 - FIRST_DECAY)
        self.second.lerp_(gradient.square(), 1 - SECOND_DECAY)
        spread = (self.second / (1 - SECOND_DECAY**number)).sqrt_().add_(SMALL)
        self.logarithms.mul_(1 - rate * decay)
        self.logarithms.addcdiv_(self.first, spread, value=-rate / (1 - FIRST_DECAY**number))

    def save(self, path: Path, key: str) -> None:
        """Write everything that is needed to go on, whole or not at all."""
        note = {"key": key, "step": self.step, "learnt": self.learnt, "history": self.history}
        with atomic_output(path, force=True) as temporary:
            save_tensors(self._tensors(), temporary, metadata={"note": json.dumps(note)})

    def load(self, path: Path, key: str) -> None:
        """Go on where `path` was saved; raises IntegrityError where that was training of another kind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["note"])
                if note["key"] != key:
                    raise IntegrityError(
                        f"{path} belongs to training with other settings, models or transcripts. "
                        f"Delete {path.parent} to begin anew, or choose another -o."
                    )
                for name, tensor in self._tensors().items():
                    tensor.copy_(file.get_tensor(name))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise IntegrityError(f"{path} cannot be read ({error}). Delete {path.parent} to begin anew.") from error
        self.step, self.learnt, self.history = note["step"], note["learnt"], note["history"]

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"logarithms": self.logarithms, "first": self.first, "second": self.second, "best": self.best}


@dataclass(frozen=True)
class Course:
    """All that training reads: lessons to learn from and lessons held back, the teacher's targets by lesson, choices."""

    learnt: Sequence[Lesson]
    held_back: Sequence[Lesson]
    targets: dict[Lesson, Target]
    choices: tuple[int, int]
    settings: TrainingSettings

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.learnt) / self.settings.batch)

    def lessons_of(self, step: int) -> list[Lesson]:
        """The lessons of one step, in an order of pairs that each epoch draws anew."""
        epoch, within = divmod(step, self.steps_an_epoch)
        pairs: dict[str, list[Lesson]] = {}
        for lesson in self.learnt:
            pairs.setdefault(lesson.pair, []).append(lesson)
        order = list(pairs.values())
        random.Random(f"{self.settings.seed} {epoch}").shuffle(order)
        lessons = [lesson for pair in order for lesson in pair]
        return lessons[within * self.settings.batch : (within + 1) * self.settings.batch]

    def rate(self, step: int) -> float:
        """The learning rate of a step: a short rise, then a cosine down to LAST_RATE of it."""
        done = step / (self.settings.epochs * self.steps_an_epoch)
        fall = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        return self.settings.rate * fall * min(1.0, (step + 1) / WARM_STEPS)

    def loss(self, student: Student, sheet: Sequence[Lesson]) -> tuple[torch.Tensor, list[Score]]:
        """The sum of the losses of lessons that are run as one sequence, to be differentiated, and each one's figures."""
        import torch

        total, scores = torch.zeros((), device=student.model.device), []
        for lesson, reading in zip(sheet, read(student.model, sheet, self.choices), strict=True):
            target = self.targets[lesson]
            wanted = target.margins.to(reading.margins.device)
            verdicts = torch.nn.functional.huber_loss(reading.margins, wanted)
            apart = divergence(reading.logits, target) if lesson.spoken else torch.zeros_like(verdicts)
            lost = state_error(reading.states, target)
            loss = self.settings.margin_weight * verdicts + apart + self.settings.state_weight * lost
            if not bool(loss.isfinite()):
                raise ModelError(f"The loss of {lesson.id} is not finite. Train with a lower --lr.")
            total = total + loss
            figures = (loss, (reading.margins - wanted).abs().mean(), apart, lost)
            scores.append(Score(*(float(figure.detach()) for figure in figures)))
        return total, scores


@dataclass(frozen=True)
class Outcome:
    """What training came to: the score of every epoch from 0, before the first; and whether it reached its end."""

    history: tuple[dict[str, Any], ...]
    steps: int
    finished: bool

    @property
    def before(self) -> Score:
        return Score(**self.history[0]["held_back"])

    @property
    def after(self) -> Score:
        return Score(**best_of(self.history)["held_back"])

    @property
    def best_epoch(self) -> float:
        return float(best_of(self.history)["epoch"])


def best_of(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the lowest loss on the lessons held back, the first of equals."""
    return min(history, key=lambda epoch: float(epoch["held_back"]["loss"]))


def settings_key(settings: TrainingSettings, **others: Any) -> str:
    """A hash of everything that the outcome of training depends on."""
    return hashlib.sha256(json.dumps(asdict(settings) | others, sort_keys=True).encode()).hexdigest()


def train(
    student: Student,
    course: Course,
    *,
    state_file: Path,
    key: str,
    deadline: float = math.inf,
    progress: Progress | None = None,
) -> Outcome:
    """Train `student`, which is left with the scales that were best on the lessons held back.

    Goes on from `state_file` where the same training (`key`) left it; it is written each minute, each epoch and on an
    interrupt. Past `deadline`, a time of time.monotonic(), training halts, and what it has come to counts too.
    """
    import torch

    progress = progress or (lambda stage, done, total: None)
    zeros = torch.zeros_like(student.logarithms)
    state = TrainingState(student.logarithms, zeros, zeros.clone(), zeros.clone())
    if state_file.is_file():
        state.load(state_file, key)
        student.refresh()
    saved = time.monotonic()
    try:
        while True:
            if len(state.history) * course.steps_an_epoch <= state.step:
                _end_epoch(student, course, state, progress)
                saved = 0.0
            if time.monotonic() - saved > SAVE_SECONDS:
                state.save(state_file, key)
                saved = time.monotonic()
            finished = _finished(state, course)
            if finished or time.monotonic() >= deadline:
                break
            _step(student, course, state, progress)
    except KeyboardInterrupt:
        if state.whole:
            state.save(state_file, key)
        raise
    if not finished:
        state.save(state_file, key)
        if state.step % course.steps_an_epoch:
            _weigh(student, course, state, state.step / course.steps_an_epoch, progress)
    student.logarithms.copy_(state.best)
    student.refresh()
    return Outcome(tuple(state.history), state.step, finished)


def evaluate(student: Student, course: Course, *, progress: Progress) -> Score:
    """The mean score over the lessons held back."""
    import torch

    scores: list[Score] = []
    with torch.no_grad():
        for sheet in sheets(course.held_back):
            scores += course.loss(student, sheet)[1]
            progress("Testing", len(scores), len(course.held_back))
    means = (sum(values) / len(scores) for values in zip(*(asdict(score).values() for score in scores), strict=True))
    return Score(*means)


def _step(student: Student, course: Course, state: TrainingState, progress: Progress) -> None:
    lessons = course.lessons_of(state.step)
    assert student.logarithms.grad is not None
    student.logarithms.grad.zero_()
    losses: list[float] = []
    for sheet in sheets(lessons):
        loss, scores = course.loss(student, sheet)
        (loss / len(lessons)).backward()
        losses += (score.loss for score in scores)
    state.whole = False
    state.update(course.rate(state.step), course.settings.decay)
    student.refresh()
    state.step += 1
    state.learnt += sum(losses)
    state.whole = True
    progress("Training", state.step, course.settings.epochs * course.steps_an_epoch)


def _end_epoch(student: Student, course: Course, state: TrainingState, progress: Progress) -> None:
    epoch = state.step // course.steps_an_epoch
    _weigh(student, course, state, epoch, progress)
    if epoch:
        state.history[-1]["learnt"] = state.learnt / len(course.learnt)
    state.learnt = 0.0


def _weigh(student: Student, course: Course, state: TrainingState, epoch: float, progress: Progress) -> None:
    """Test the student, put the score down, and keep its scales where they are the best so far."""
    score = evaluate(student, course, progress=progress)
    state.history.append({"epoch": epoch, "learnt": None, "held_back": asdict(score)})
    if state.best_epoch == epoch:
        state.best.copy_(student.logarithms)


def _finished(state: TrainingState, course: Course) -> bool:
    settings = course.settings
    epochs = len(state.history) - 1
    return epochs >= settings.epochs or epochs - state.best_epoch >= settings.patience
