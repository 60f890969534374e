"""Transcripts of the real reference judge hold the very ids that its backend was fed, and so what it saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import request_for, run_all
from gramlite.quant.calibration import Transcript, record_transcripts

from gramlite.generation.decoder import Decoder, Generation
from gramlite.judging.judge import Judge, Settings
from gramlite.judging.pair import Pair, Verdict
from gramlite.loading import load

PAIR = Pair("Name a prime number between 8 and 12.", "11 is prime.", "9 is a prime number.", id="prime")
TOLERANCE = 0.35  # nats; what another shape of the batch may change


class Look:
    """A decoder that takes the logits behind its prompt and ends."""

    finished = False
    answering = True
    generated = 0
    logits: Any = None

    def advance(self, logits: Any) -> tuple[int, ...]:
        self.logits, self.finished = np.array(logits, dtype=np.float64), True
        return ()

    def result(self, *, cached: int = 0) -> Generation:
        return Generation(thinking=None, forced=False, generated=0)


def logits_behind(judge: Judge, ids: tuple[int, ...]) -> Any:
    look, backend = Look(), judge.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_decoder", lambda request: look)
        run_all(backend, [request_for(0, ids)])
    return look.logits


def log_probability(logits: Any, token: int) -> float:
    return float(logits[token] - np.logaddexp.reduce(logits))


@dataclass
class Watched:
    """One judging: its verdict and transcript, the token that was fed at each position, and what each choice saw.

    `chosen` holds the sampled tokens with the log-probability that the judge's own logits gave them.
    """

    judge: Judge
    fed: dict[int, int] = field(default_factory=dict)
    chosen: list[tuple[int, float]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def text(self, tokens: Any) -> bytes:
        return b"".join(map(self.judge.backend.vocabulary.piece, tokens))

    def closes_at(self, tokens: Any) -> int:
        """The place of the token with which the mark that closes the thinking begins."""
        before = self.text(tokens).rindex(b"</think>")
        return next(place for place in range(len(tokens)) if len(self.text(tokens[: place + 1])) > before)

    def record(self) -> Transcript:
        from gramlite.backends.gguf.context import LlamaContext

        add, advance, many = LlamaContext.add, Decoder.advance, self.judge.many

        def watched_add(context: Any, tokens: Any, sequences: Any, position: int) -> None:
            self.fed.update(zip(range(position, position + len(tokens)), tokens, strict=True))  # a refuted guess goes
            add(context, tokens, sequences, position)

        def watched_advance(decoder: Decoder, logits: Any) -> Any:
            thinking = not decoder.answering
            said = advance(decoder, logits)
            if thinking and said:
                self.chosen.append((said[0], log_probability(np.array(logits, dtype=np.float64), said[0])))
            return said

        def watched_many(pairs: Any) -> Iterator[Verdict]:
            for verdict in many(pairs):
                self.verdicts.append(verdict)
                yield verdict

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaContext, "add", watched_add)
            patch.setattr(Decoder, "advance", watched_advance)
            patch.setattr(self.judge, "many", watched_many)
            (transcript,) = record_transcripts(self.judge, [PAIR])
        return transcript


def check_ids(watched: Watched, transcript: Transcript) -> None:
    assert transcript.ids[:-1] == tuple(watched.fed[position] for position in range(len(transcript.ids) - 1))
    verdict = watched.text(transcript.ids[-1:])  # which is read, not fed
    assert verdict.decode() == watched.verdicts[0].winner


@pytest.mark.fault("transcripts")
def test_a_rationale_s_ids_are_those_that_were_fed_and_mean_what_the_judge_saw(reference_q8: Path) -> None:
    with load(reference_q8, settings=Settings(mode="think", budget=512, orders="ab")) as judge:
        watched = Watched(judge)
        transcript = watched.record()
        closing, seen = watched.chosen[watched.closes_at([token for token, _ in watched.chosen])]
        start = len(transcript.prompt_ids) + watched.closes_at(transcript.generated_ids)
        assert transcript.ids[start] == closing
        found = log_probability(logits_behind(judge, transcript.ids[:start]), closing)
        last = logits_behind(judge, transcript.ids[:-1])
        first, second = (judge.backend.vocabulary.encode(letter)[0] for letter in "AB")
    assert seen > -1, "the judge closes its thinking of its own accord"
    assert found == pytest.approx(seen, abs=TOLERANCE)
    assert last[first] - last[second] == pytest.approx(watched.verdicts[0].margin, abs=TOLERANCE)
    check_ids(watched, transcript)


@pytest.mark.parametrize(
    ("mode", "budget"), [pytest.param("think", 12, marks=pytest.mark.fault("transcripts")), ("direct", 1)]
)
def test_what_is_forced_is_in_the_ids(mode: Any, budget: int, reference_q8: Path) -> None:
    with load(reference_q8, settings=Settings(mode=mode, budget=budget, orders="ab")) as judge:
        watched = Watched(judge)
        check_ids(watched, watched.record())
        assert len(watched.chosen) == (budget if mode == "think" else 0)
