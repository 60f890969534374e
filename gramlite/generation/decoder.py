"""How a generation becomes a verdict: one small state machine that every backend runs.

    thinking  tokens are sampled freely until `</think>`, the end of the text, a repetition loop or the budget
    closing   the rest of the scaffold, `</think>\\n<answer>\\n`, is appended without asking the model
    answer    the logits of the two answer tokens alone are read; nothing is sampled

Direct mode starts in the last state: its whole scaffold is part of the prompt, so a verdict is one forward pass.
Because the scaffold is forced and only two logits are read, no grammar engine is needed, every generation ends in a
verdict, and nothing that stood in the prompt is ever parsed.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .prompt import encode_trusted
from .vocabulary import Vocabulary

Logits = npt.NDArray[np.float32]
Mode = Literal["think", "direct"]

LOOP_CHECK_EVERY = 32  # tokens between two looks for a repetition loop
LOOP_WINDOW = 512  # tokens looked at
LOOP_MINIMUM = 96  # tokens that must repeat, and at least three whole periods


@dataclass(frozen=True)
class AnswerForm:
    """The scaffold of an answer.

    `opening` starts the thinking, `closing` ends it, `answer` leads from there to the verdict token, and `choices`
    are the two verdicts' texts. A form without `closing` has no thinking: the verdict follows the prompt at once.
    """

    opening: str
    closing: str
    answer: str
    choices: tuple[str, str] = ("A", "B")

    @property
    def thinks(self) -> bool:
        return bool(self.closing)

    @property
    def direct(self) -> str:
        """The scaffold that skips the thinking, GRAM-R²'s empty think block."""
        return f"{self.opening}\n{self.closing}{self.answer}" if self.thinks else self.answer


@dataclass(frozen=True)
class Answer:
    """An answer form in a model's tokens, as a request holds it.

    `opening` ends the prompt; `closing` closes the thinking on a line of its own and leads to the verdict, empty where
    nothing is thought; `choices` are the ids whose logits are read. `form` says the same in text, for thinking whose
    closing begins in the middle of a token.
    """

    form: AnswerForm
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    choices: tuple[int, ...]

    @property
    def thinks(self) -> bool:
        return bool(self.closing)


def encode_answer(vocabulary: Vocabulary, form: AnswerForm, mode: Mode) -> Answer:
    """An answer form in the tokens of a vocabulary; raises ValueError where a choice is no single token."""
    thinks = form.thinks and mode == "think"
    opening = encode_trusted(vocabulary, form.opening if thinks else form.direct)
    closing = encode_trusted(vocabulary, f"\n{form.closing}{form.answer}") if thinks else []
    return Answer(form, tuple(opening), tuple(closing), choice_tokens(vocabulary, form))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished generation.

    `reads` holds the logits of each read's choices, empty where nothing was read, and then `reason` says why. `forced` is
    true when the thinking was closed by us. `generated` counts the tokens sampled, `cached` the prompt tokens that were
    not computed again. `ids` are all tokens behind the prompt as the model was fed them, sampled and forced ones, and
    last the verdict's, the likelier choice.
    """

    reads: tuple[tuple[float, ...], ...] = ()
    thinking: str | None
    forced: bool
    generated: int
    cached: int = 0
    reason: str | None = None
    ids: tuple[int, ...] = ()


class Decoder:
    """The state machine of one generation: `advance(logits)` returns the tokens to feed next, none when finished.

    `budget` is the most tokens it may think; a `temperature` of 0 is greedy. `on_text` is given the thinking as it is
    written, each piece with its place in it, in characters; after a restart it begins at 0 again.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        answer: Answer,
        *,
        budget: int = 1024,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._answer = answer
        self._budget = budget
        self._temperature = temperature
        self._seed = seed
        self._closing = answer.form.closing.encode()
        self._on_text = on_text
        self.restart()

    def restart(self) -> None:
        """Start again behind the prompt."""
        self.finished = False
        self._answering = not self._answer.thinks
        self._tokens: list[int] = []
        self._ids = list(self._answer.opening)
        self._text = bytearray()
        self._forced = False
        self._reads: tuple[tuple[float, ...], ...] = ()
        self._reason: str | None = None
        self._told = self._told_characters = 0
        self._stream = codecs.getincrementaldecoder("utf-8")("replace")
        self._random = np.random.default_rng(self._seed) if self._temperature > 0 else None

    @property
    def generated(self) -> int:
        return len(self._tokens)

    @property
    def answering(self) -> bool:
        """Whether the next logits are read as the verdict."""
        return self._answering

    def advance(self, logits: Logits) -> Sequence[int]:
        """Take the logits after the last token fed, shape (vocabulary,); return the tokens to feed next."""
        if self.finished:
            return ()
        if self._answering:
            return self._read_answer(logits)
        fed = self._think(logits)
        self._ids += fed
        return fed

    def _think(self, logits: Logits) -> Sequence[int]:
        """Sample the next token of the thinking; return it with what is forced behind it."""
        token = self._sample(logits)
        if token is None:
            return self._fail("the model's logits are not finite")
        if token in self._vocabulary.end_tokens:
            return self._close()
        self._tokens.append(token)
        piece = self._vocabulary.piece(token)
        self._text += piece
        closed = self._text.find(self._closing, max(0, len(self._text) - len(self._closing) - len(piece)))
        self._tell(len(self._text) - self._begun_closing() if closed < 0 else closed)
        if closed >= 0:
            self._answering = True
            return [token, *self._rest_of_scaffold()]
        if len(self._tokens) >= self._budget or self._loops():
            return [token, *self._close()]
        return [token]

    def _fail(self, reason: str) -> Sequence[int]:
        """End without a verdict."""
        self.finished = True
        self._reason = reason
        return ()

    def result(self, *, cached: int = 0) -> Generation:
        """The finished generation; `cached` is the backend's count of prompt tokens it did not compute again."""
        thinking = None
        if self._answer.thinks:
            body, _, _ = bytes(self._text).partition(self._closing)
            thinking = body.decode("utf-8", "replace").strip()
        return Generation(
            reads=self._reads,
            thinking=thinking,
            forced=self._forced,
            generated=len(self._tokens),
            cached=cached,
            reason=self._reason,
            ids=tuple(self._ids),
        )

    def _sample(self, logits: Logits) -> int | None:
        best = int(np.argmax(logits))  # argmax stops at a NaN, so one look at the winner finds NaN and +inf
        if not np.isfinite(logits[best]):
            return None
        if self._random is None:
            return best
        weights = np.exp((logits - logits[best]) * np.float32(1 / self._temperature), dtype=np.float32)
        cumulative = np.cumsum(weights, dtype=np.float64)
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))

    def _read_answer(self, logits: Logits) -> Sequence[int]:
        choices = self._answer.choices
        read = tuple(float(logits[token]) for token in choices)
        if not all(map(np.isfinite, read)):
            return self._fail("the model's logits are not finite")
        self._reads = (read,)
        self._ids.append(choices[read.index(max(read))])
        self.finished = True
        return ()

    def _close(self) -> Sequence[int]:
        """Close the thinking by force, completing a closing tag that was cut short."""
        self._forced = True
        self._answering = True
        begun = self._begun_closing()
        lead = b"" if begun or not self._text or self._text.endswith(b"\n") else b"\n"
        rest = lead + self._closing[begun:] + self._answer.form.answer.encode()
        return encode_trusted(self._vocabulary, rest.decode())

    def _begun_closing(self) -> int:
        """How many bytes at the end of the text may be the beginning of the closing tag."""
        return next((n for n in range(len(self._closing) - 1, 0, -1) if self._text.endswith(self._closing[:n])), 0)

    def _tell(self, end: int) -> None:
        """Let the listener hear the thinking up to `end`; a tag that may be closing it is held back."""
        if self._on_text and end > self._told:
            text = self._stream.decode(bytes(self._text[self._told : end]))
            self._on_text(self._told_characters, text)
            self._told, self._told_characters = end, self._told_characters + len(text)

    def _rest_of_scaffold(self) -> Sequence[int]:
        """What is left of the scaffold after a closing tag that the model wrote itself."""
        _, _, after = bytes(self._text).rpartition(self._closing)
        answer = self._answer.form.answer.encode()
        rest = answer[len(after) :] if answer.startswith(after) else answer
        return encode_trusted(self._vocabulary, rest.decode())

    def _loops(self) -> bool:
        """Whether the tail repeats one phrase: at least three periods and LOOP_MINIMUM tokens of it."""
        if len(self._tokens) % LOOP_CHECK_EVERY or len(self._tokens) < LOOP_MINIMUM:
            return False
        tail = np.asarray(self._tokens[-LOOP_WINDOW:])
        for period in range(1, len(tail) // 3 + 1):
            needed = max(LOOP_MINIMUM, 3 * period)
            if needed <= len(tail) and np.array_equal(tail[-needed + period :], tail[-needed:-period]):
                return True
        return False


def choice_tokens(vocabulary: Vocabulary, form: AnswerForm) -> tuple[int, int]:
    """The ids of the two verdict tokens as they follow the scaffold; ValueError when one is no single token."""
    before = encode_trusted(vocabulary, form.direct)
    ids = []
    for choice in form.choices:
        after = encode_trusted(vocabulary, form.direct + choice)
        if after[:-1] != before:
            raise ValueError(f"the verdict {choice!r} is not one token of this vocabulary")
        ids.append(after[-1])
    return ids[0], ids[1]


def softmax_first(margin: float) -> float:
    """p(first) of two logits that differ by `margin` nats."""
    if margin >= 0:
        return float(1 / (1 + np.exp(-margin)))
    weight = float(np.exp(margin))
    return weight / (1 + weight)
