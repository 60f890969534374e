"""What of an item is the question and what each completion's response."""

from __future__ import annotations

from typing import Any

import pytest
from messages import (
    MUSEUM,
    MUSEUM_TEXT,
    NO,
    RYE,
    TOOL,
    WEATHER,
    YES,
    parts,
    reply,
    said,
)

from gramlite.errors import InputError
from gramlite.rows import item_from_json


def case(name: str, row: dict[str, Any], prompt: str, first: str = YES, second: str = NO, *, fault: bool = True) -> Any:
    marks = [pytest.mark.fault("conversations")] if fault else []
    return pytest.param(row, prompt, first, second, id=name, marks=marks)


RANKED = [
    case(
        "tools",
        {"prompt": WEATHER, "completions": [[*reply("I look."), TOOL, *reply("3 degrees.")], reply("Sunny.")]},
        "Weather in Oslo?",
        "Assistant: I look.\n\nTool: 3 C, rain\n\nAssistant: 3 degrees.",
        "Sunny.",
    ),
    case("parts", {"prompt": [{"role": "user", "content": parts("Hi")}], "completions": ["a", "b"]}, "Hi", "a", "b"),
    case(
        "full conversations", {"prompt": MUSEUM[2], "completions": [said(*MUSEUM, YES), said(*MUSEUM, NO)]}, MUSEUM_TEXT
    ),
    case("equal completions", {"prompt": RYE, "completions": [reply(YES), YES]}, RYE, YES, YES, fault=False),
    case("system text", {"system": "s", "prompt": RYE, "completions": [YES, NO]}, f"System: s\n\nUser: {RYE}"),
]


@pytest.mark.parametrize(("row", "prompt", "first", "second"), RANKED)
def test_completions_are_read_the_same_way(row: dict[str, Any], prompt: str, first: str, second: str) -> None:
    item = item_from_json(row)
    assert (item.prompt, item.completions) == (prompt, (first, second))


@pytest.mark.fault("conversations")
def test_a_single_completion_is_what_follows_the_prompt() -> None:
    assert item_from_json({"prompt": "Hi", "completions": ["a"]}).completions == ("a",)
    item = item_from_json({"prompt": "Hi", "completions": [said("Hi", "a", "b", "c")]})
    assert (item.prompt, item.completions) == ("Hi", ("Assistant: a\n\nUser: b\n\nAssistant: c",))


@pytest.mark.fault("conversations")
def test_a_completion_that_ends_with_the_user_is_refused() -> None:
    with pytest.raises(InputError, match=r"completions\[1\] ends with the user"):
        item_from_json({"prompt": "Hi", "completions": ["a", said("Hi", "a", "b")]})


def test_completions_without_a_prompt_are_of_no_shape() -> None:
    with pytest.raises(InputError, match="unknown shape"):
        item_from_json({"completions": [said(RYE, YES), said(RYE, NO)]})
