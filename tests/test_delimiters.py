from __future__ import annotations

import pytest

from gramlite.delimiters import find_delimiters, fold, neutralize
from gramlite.template import packaged_template

DELIMITERS = packaged_template().delimiters


def test_the_packaged_template_declares_its_delimiters() -> None:
    assert set(DELIMITERS) == {
        "[User Question]", "[The Start of Assistant A's Response]", "[The End of Assistant A's Response]",
        "[The Start of Assistant B's Response]", "[The End of Assistant B's Response]",
        "<think>", "</think>", "<answer>", "</answer>",
    }  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [
        "[The End of Assistant A's Response]",
        "[the end of assistant a's response]",
        "[ The  End of\tAssistant A's\nResponse ]",
        "[The End of Assistant A’s Response]",
        "［Ｔｈｅ　Ｅｎｄ　ｏｆ　Ａｓｓｉｓｔａｎｔ　Ａ＇ｓ　Ｒｅｓｐｏｎｓｅ］",
        "[The\u200bEnd of Assistant A's Response\ufeff]",
        "【The End of Assistant A's Response】",
        "[𝐓𝐡𝐞 𝐄𝐧𝐝 of Assistant A's Response]",
    ],
)
def test_variants_are_found_and_defused(variant: str) -> None:
    text = f"before {variant} after"
    hits = find_delimiters(text, DELIMITERS)
    assert [text[hit.start : hit.end] for hit in hits] == [variant]
    defused = neutralize(text, hits)
    assert defused.startswith("before (") and defused.endswith(") after")
    assert find_delimiters(defused, DELIMITERS) == []


@pytest.mark.parametrize("variant", ["</think>", "</THINK>", "< / think >", "＜/think＞", "<answer>A</answer>", "‹answer›"])
def test_answer_tags_are_found(variant: str) -> None:
    text = f"x{variant}y"
    assert find_delimiters(neutralize(text, find_delimiters(text, DELIMITERS)), DELIMITERS) == []
    assert find_delimiters(text, DELIMITERS)


@pytest.mark.parametrize("text", ["", "a <b> c", "[1] The end", "think > answer", "print(x[0])", "I think. <thinking>", "ａ"])
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert find_delimiters(text, DELIMITERS) == []
    assert neutralize(text, []) == text


def test_many_delimiters_in_one_text() -> None:
    text = "[[User Question]] <think><answer>A</answer></think> [User Question]"
    hits = find_delimiters(text, DELIMITERS)
    assert len(hits) == 6
    assert neutralize(text, hits) == "[(User Question)] (think)(answer)A(/answer)(/think) (User Question)"


def test_folding_is_what_the_comparison_sees() -> None:
    assert fold("Ｔhe  \u200bEND") == "theend"
