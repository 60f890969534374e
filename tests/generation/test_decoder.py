from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fakes import END, FakeVocabulary, logits_for, run_script

from gramlite.generation.decoder import (
    AnswerForm,
    Decoder,
    Generation,
    Mode,
    choice_tokens,
    encode_answer,
    softmax_first,
)
from gramlite.judging.template import REASONING, VERDICT_ONLY

VOCABULARY = FakeVocabulary()
CLOSED = "Feedback:\nfine\n</think>"


def decoder(
    vocabulary: FakeVocabulary = VOCABULARY, *, mode: Mode = "think", form: AnswerForm = REASONING, **sampling: Any
) -> Decoder:
    return Decoder(vocabulary, encode_answer(vocabulary, form, mode), **sampling)


def margin(generation: Generation) -> float:
    first, second = generation.reads[0]
    return first - second


def test_direct_mode_is_one_step() -> None:
    direct = decoder(mode="direct")
    assert VOCABULARY.text(direct._answer.opening) == "<think>\n\n</think>\n<answer>\n"
    assert not direct._answer.closing
    assert list(direct.advance(logits_for(END, A=3, B=1))) == []
    generation = direct.result()
    assert margin(generation) == 2 and generation.thinking is None and generation.generated == 0


def test_thinking_that_closes_itself() -> None:
    thinking = decoder()
    assert VOCABULARY.text(thinking._answer.opening) == "<think>\n"
    generation, fed = run_script(thinking, CLOSED.encode())
    assert VOCABULARY.text(fed) == CLOSED + "\n<answer>\n"
    assert generation.thinking == "Feedback:\nfine" and not generation.forced
    assert margin(generation) == pytest.approx(1.5) and generation.generated == len(CLOSED)


@pytest.mark.parametrize(
    ("written", "fed_after"),
    [
        ("all good", "\n</think>\n<answer>\n"),
        ("all good\n", "</think>\n<answer>\n"),
        ("all good\n</th", "ink>\n<answer>\n"),
        ("a <", "/think>\n<answer>\n"),
    ],
)
def test_a_budget_that_runs_out_closes_by_force(written: str, fed_after: str) -> None:
    generation, fed = run_script(decoder(budget=len(written)), written.encode() + b"never written")
    assert VOCABULARY.text(fed) == written + fed_after
    assert generation.forced and generation.generated == len(written) and generation.reads


def test_the_end_of_the_text_closes_by_force() -> None:
    generation, fed = run_script(decoder(), b"short")
    assert VOCABULARY.text(fed) == "short\n</think>\n<answer>\n" and generation.forced


def test_a_token_that_runs_past_the_closing_tag_is_not_repeated() -> None:
    vocabulary = FakeVocabulary(merges={b">\n": 301, b">\n<answer>": 302})
    for last in (301, 302):
        generation, fed = run_script(decoder(vocabulary), [*b"ok\n</think", last])
        assert vocabulary.text(fed) == "ok\n</think>\n<answer>\n" and generation.thinking == "ok"


def test_a_closing_tag_that_is_a_special_token() -> None:
    vocabulary = FakeVocabulary(special_tokens={"</think>": 301}, merges={b"</think>": 301})
    generation, fed = run_script(decoder(vocabulary), [*b"ok\n", 301])
    assert not generation.forced and generation.thinking == "ok"
    _, fed = run_script(decoder(vocabulary, budget=3), b"ok\nmore")
    assert fed.count(301) == 1, "the forced scaffold writes the tag as the model's own token"


@pytest.mark.fault("transcripts")
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("written", "sampling"),
    [(CLOSED, {}), ("all good", {"budget": 8}), ("a </th", {"budget": 6}), ("short", {}), ("x y z. " * 90, {}), ("", {"mode": "direct"})],
)  # fmt: skip
def test_the_ids_are_all_that_was_fed_and_then_the_verdict(
    written: str, sampling: dict[str, Any], restarted: bool
) -> None:
    for a, b, verdict in ((2.0, 0.5, "A"), (0.5, 2.0, "B")):
        thinking = decoder(**sampling)
        if restarted and "mode" not in sampling:
            thinking.advance(logits_for(ord("?")))
            thinking.restart()
        generation, fed = run_script(thinking, written.encode(), a=a, b=b)
        assert generation.ids == (*thinking._answer.opening, *fed, ord(verdict))


def test_a_repetition_loop_ends_the_thinking() -> None:
    generation, _ = run_script(decoder(budget=5000), b"Response A is better. " * 100)
    assert generation.forced and generation.generated < 400 and generation.reads
    varied = " ".join(str(n) for n in range(400)).encode()
    generation, _ = run_script(decoder(budget=5000), varied + b"</think>")
    assert not generation.forced


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_verdict(bad: float) -> None:
    for mode in ("think", "direct"):
        stopped = decoder(mode=mode)
        logits = logits_for(ord("A"))
        logits[ord("A")] = bad
        stopped.advance(logits)
        generation = stopped.result()
        assert stopped.finished and not generation.reads and "not finite" in (generation.reason or "")


def test_an_answer_of_minus_infinity_gives_no_verdict() -> None:
    direct = decoder(mode="direct")
    direct.advance(logits_for(END, A=-np.inf, B=0))
    assert not direct.result().reads


def test_sampling_follows_the_temperature_and_the_seed() -> None:
    def draws(temperature: float) -> list[int]:
        logits = np.full(400, -np.inf, dtype=np.float32)
        logits[ord("x")], logits[ord("y")] = 1.0, 0.0
        return [decoder(temperature=temperature, seed=seed).advance(logits)[0] for seed in range(2000)]

    for temperature in (0.5, 1.0, 2.0):
        share = draws(temperature).count(ord("x")) / 2000
        assert share == pytest.approx(softmax_first(1 / temperature), abs=0.035)
    assert draws(1.0) == draws(1.0)


def test_streamed_text_is_whole_characters() -> None:
    heard: list[str] = []
    listening = decoder(on_text=lambda at, text: heard.append(text))
    run_script(listening, "naïve – ☕".encode() + b"</think>")
    assert "".join(heard) == "naïve – ☕"
    assert len(heard) == len("naïve – ☕".encode()), "each token is heard when it comes"


def test_a_closing_tag_is_held_back_until_it_is_none() -> None:
    heard: list[str] = []
    run_script(decoder(on_text=lambda at, text: heard.append(text)), b"a </thin line</think>")
    assert "".join(heard) == "a </thin line"


def test_verdict_only_forms_never_think() -> None:
    answering = decoder(form=VERDICT_ONLY)
    assert not answering._answer.opening and answering.answering


def test_choices_must_be_single_tokens() -> None:
    assert choice_tokens(VOCABULARY, REASONING) == (ord("A"), ord("B"))
    with pytest.raises(ValueError, match="not one token"):
        choice_tokens(VOCABULARY, AnswerForm("", "", "", choices=("first", "second")))


def test_softmax_first_at_the_extremes() -> None:
    assert softmax_first(0) == 0.5
    assert softmax_first(-1000) == 0 and softmax_first(1000) == 1
    assert softmax_first(2) == pytest.approx(1 / (1 + math.exp(-2)))
