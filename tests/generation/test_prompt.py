from __future__ import annotations

import pytest
from fakes import FakeVocabulary

from gramlite.errors import InputError
from gramlite.generation.prompt import Segment, common_prefix, encode_prompt, encode_trusted

SPECIAL = {"<|im_start|>": 300, "<|im_end|>": 301, "<|im_end|><|im_end|>": 302, "</think>": 303}
VOCABULARY = FakeVocabulary(special_tokens=SPECIAL)


def test_trusted_literals_become_ids_and_text_stays_text() -> None:
    encoded = encode_prompt(VOCABULARY, [Segment("<|im_start|>a"), Segment("b", "prompt"), Segment("c<|im_end|>")])
    assert encoded.tokens == (300, *b"abc", 301) and encoded.literals == ()


def test_the_longest_literal_wins() -> None:
    assert encode_trusted(VOCABULARY, "<|im_end|><|im_end|>") == [302]


@pytest.mark.parametrize("text", ["<|im_end|>", "x<|im_end|><|im_end|>y", "</think>", "<|im_start|><|im_end|>"])
def test_untrusted_literals_are_text(text: str) -> None:
    encoded = encode_prompt(VOCABULARY, [Segment("<|im_start|>"), Segment(text, "response_a"), Segment("<|im_end|>")])
    assert encoded.tokens[0] == 300 and encoded.tokens[-1] == 301
    assert all(token < 256 for token in encoded.tokens[1:-1])
    assert bytes(encoded.tokens[1:-1]).decode() == text
    assert {field for field, _ in encoded.literals} == {"response_a"}


def test_a_literal_across_a_border_is_text() -> None:
    for segments in (
        [Segment("<|im_"), Segment("end|>", "prompt")],
        [Segment("<|im_", "prompt"), Segment("end|>")],
        [Segment("<|im_", "prompt"), Segment("", "response_a"), Segment("end|>")],
    ):
        encoded = encode_prompt(VOCABULARY, segments)
        assert bytes(encoded.tokens).decode() == "<|im_end|>"


def test_merges_cross_the_border_of_a_segment() -> None:
    vocabulary = FakeVocabulary(merges={b"\n ": 310})
    encoded = encode_prompt(vocabulary, [Segment("Q:\n"), Segment(" hi", "prompt")])
    assert encoded.tokens == (*b"Q:", 310, *b"hi")


def test_a_special_token_of_one_character_is_refused() -> None:
    vocabulary = FakeVocabulary(special_tokens={"§": 300})
    with pytest.raises(InputError, match="special token"):
        encode_prompt(vocabulary, [Segment("§ 1", "prompt")])


def test_common_prefix_agrees_with_counting() -> None:
    cases = [
        ((), ()),
        ((1,), ()),
        ((1, 2, 3), (1, 2, 3)),
        ((1, 2, 3), (1, 2, 4, 5)),
        ((9,), (1, 2)),
        ((1,) * 99, (1,) * 70 + (2,)),
    ]
    for first, second in cases:
        expected = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        assert common_prefix(first, second) == expected == common_prefix(second, first)
