"""Neighbours to be timed beside gramlite: asked the same question, of the same judge."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gramlite.bench.neighbours import llama_contest, parse_against, transformers_contest

from gramlite.errors import GramliteError, InputError
from gramlite.judging.judge import Judge, Settings
from gramlite.judging.pair import Pair
from gramlite.loading import load
from gramlite.reference.files import build_checkpoint
from gramlite.runtime.options import RuntimeOptions

PAIRS = [
    Pair("Name the capital of France.", "Paris.", "It is Lyon, I think.", id="1"),
    Pair("Say hello in German.", "Bonjour!", "Guten Tag!", id="2"),
]


def test_names_are_checked() -> None:
    assert parse_against("") == []
    assert parse_against("transformers, llama-cpp-python,transformers") == ["transformers", "llama-cpp-python"]
    with pytest.raises(InputError, match=r"does not know vllm. It knows llama-cpp-python, transformers"):
        parse_against("llama-cpp-python,vllm")


class FakeLlama:
    """Keeps what it was asked."""

    asked: list[dict[str, Any]] = []

    def __init__(self, path: str, **options: Any) -> None:
        self.options = options

    def create_completion(self, prompt: str, **options: Any) -> None:
        self.asked.append({"prompt": prompt, "all": self.options["logits_all"], **options})

    def create_chat_completion(self, messages: Sequence[Any], **options: Any) -> None:
        self.asked.append({"messages": messages, **options})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    fake = type(sys)("llama_cpp")
    fake.Llama = FakeLlama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(FakeLlama, "asked", [])
    return FakeLlama.asked


def judge_of(scripted: Path, mode: str) -> Judge:
    judge = load(scripted, settings=Settings(mode=mode))  # type: ignore[arg-type]
    judge.model = {**judge.model, "format": "gguf"}  # the only one that llama-cpp-python opens
    return judge


def test_llama_is_asked_for_both_orders_and_only_shows_probabilities_where_they_are_wanted(
    scripted: Path, asked: list[dict[str, Any]]
) -> None:
    contest = llama_contest(judge_of(scripted, "direct"), scripted, threads=2, context=512, tokens=9)
    assert list(contest) == ["llama-cpp-python, probability", "llama-cpp-python, letter"]
    for judge_pairs in contest.values():
        judge_pairs(PAIRS)
    assert [(one["all"], one["logprobs"], one["max_tokens"]) for one in asked] == [(True, 5, 1)] * 4 + [
        (False, None, 1)
    ] * 4
    assert all(one["prompt"].endswith("<think>\n\n</think>\n<answer>\n") for one in asked)
    first, swapped = asked[0]["prompt"], asked[1]["prompt"]
    assert first.index("Paris.") < first.index("Lyon") and swapped.index("Lyon") < swapped.index("Paris.")


def test_llama_is_left_to_think(scripted: Path, asked: list[dict[str, Any]]) -> None:
    contest = llama_contest(judge_of(scripted, "think"), scripted, threads=2, context=512, tokens=9)
    contest["llama-cpp-python, rationale"](PAIRS)
    assert len(asked) == 4 and {one["max_tokens"] for one in asked} == {9}
    assert asked[3]["messages"][0]["content"].index("Guten Tag!") < asked[3]["messages"][0]["content"].index("Bonjour!")


def test_what_transformers_needs_is_said(scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_of(scripted, "direct")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GramliteError, match=r"pip install 'gramlite\[gptq\]'"):
        transformers_contest(judge, tmp_path, precision="float32", threads=1, tokens=9)
    monkeypatch.delitem(sys.modules, "transformers")
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="holds no config.json"):
        transformers_contest(judge, tmp_path, precision="float32", threads=1, tokens=9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_neighbours_say_what_gramlite_says(reference_f16: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    checkpoint = build_checkpoint(tmp_path / "checkpoint")
    with load(reference_f16, settings=Settings(mode="direct"), runtime=RuntimeOptions(context=2048)) as judge:
        ours = [order for verdict in judge.many(PAIRS) for order in verdict.orders]
        contest = transformers_contest(judge, checkpoint, precision="float32", threads=2, tokens=8)
        letters: Any = contest["transformers float32, letter"](PAIRS)
        for order, (first, second) in zip(ours, letters, strict=True):
            margin = (first - second) * (1 if order.order == "ab" else -1)
            assert order.margin == pytest.approx(margin, abs=0.05)
        said: Any = llama_contest(judge, reference_f16, threads=2, context=2048, tokens=8)["llama-cpp-python, letter"](
            PAIRS
        )
        for order, answer in zip(ours, said, strict=True):
            letter = answer["choices"][0]["text"].strip()
            assert (letter == "A") == ((order.verdict == "A") == (order.order == "ab"))
        thinking = judge.with_settings(mode="think")
        (written,) = transformers_contest(thinking, checkpoint, precision="bfloat16", threads=2, tokens=8).values()
        assert len(written(PAIRS[:1])) == 2  # type: ignore[arg-type]
