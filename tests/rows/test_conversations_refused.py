"""Rows of which it cannot be told what the question or a response is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from messages import (
    NO,
    RYE,
    RYE_SIDES,
    YES,
    human,
    reply,
    said,
)

from gramlite.errors import InputError
from gramlite.rows import pair_from_json


def refused(name: str, row: dict[str, Any], reason: str, *, fault: bool = True) -> Any:
    return pytest.param(row, reason, id=name, marks=[pytest.mark.fault("conversations")] if fault else [])


def with_content(content: Any) -> dict[str, Any]:
    return {"prompt": RYE, "chosen": [{"role": "assistant", "content": content}], "rejected": reply(NO)}


REFUSED = [
    refused(
        "a side that is all in the prompt",
        {"prompt": said("a", "b", RYE, YES), "chosen": said(RYE, YES), "rejected": said(RYE, NO)},
        "chosen opens a conversation that does not hold",
    ),
    refused(
        "ends with the user",
        {"chosen": said("Hi", "Hello", "thanks"), "rejected": said("Hi", "Go away", "oh")},
        "chosen ends with the user",
    ),
    refused(
        "one side ends with the user",
        {"chosen": said(RYE, YES), "rejected": said(RYE, NO, "oh")},
        "rejected ends with the user",
    ),
    refused(
        "ends with system text",
        {"prompt": RYE, "chosen": reply(YES), "rejected": [*reply(NO), {"role": "system", "content": "s"}]},
        "rejected ends with the system",
    ),
    refused(
        "hh-rlhf ends with the human",
        {"chosen": human(RYE, YES), "rejected": human(RYE, NO, "oh")},
        "rejected ends with the human",
    ),
    refused(
        "one side goes on",
        {"chosen": said(RYE, YES), "rejected": said(RYE, YES, "Really?", NO)},
        "rejected goes on where chosen ends",
    ),
    refused(
        "one side goes on after the prompt",
        {"prompt": RYE, "chosen": said(RYE, YES), "rejected": said(RYE, YES, "Really?", NO)},
        "rejected goes on where chosen ends",
    ),
    refused(
        "other questions", {"chosen": said("Is oat a grass?", YES), "rejected": said(RYE, NO)}, "share no question"
    ),
    refused(
        "other questions after the same system text",
        {"chosen": said("#s", "a", YES), "rejected": said("#s", "b", NO)},
        "share no question",
    ),
    refused(
        "another question than the prompt",
        {"prompt": "Is oat a grass?", **RYE_SIDES},
        "chosen opens a conversation that does not hold",
    ),
    refused(
        "other system texts",
        {"system": "s", "chosen": said("#t", RYE, YES), "rejected": said("#t", RYE, NO)},
        "chosen opens a conversation that does not hold",
    ),
    refused("replies without a prompt", {"chosen": reply(YES), "rejected": reply(NO)}, "share no question"),
    refused("strings without a prompt", {"chosen": YES, "rejected": NO}, "no prompt.*Accepted: prompt"),
    refused("a list beside a string", {"chosen": said(RYE, YES), "rejected": NO}, "share no question"),
    refused(
        "several rejected",
        {"prompt": RYE, "chosen": [YES], "rejected": [NO, "Never."]},
        "rejected holds 2 responses.*gramlite rank",
    ),
    refused("no content", with_content(None), r"chosen\[0\] has no content"),
    refused(
        "an image",
        with_content([{"type": "image_url", "image_url": {"url": "x"}}]),
        r"chosen\[0\] holds a part of type 'image_url'",
    ),
    refused("content of another kind", with_content({"a": 1}), r"chosen\[0\] has a content of dict", fault=False),
    refused("a number", with_content(3), r"chosen\[0\] has a content of int", fault=False),
    refused(
        "a call of nothing",
        {"prompt": RYE, "chosen": [{"role": "assistant", "tool_calls": [{"function": {}}]}], "rejected": reply(NO)},
        r"chosen\[0\] has a tool call without",
    ),
    refused(
        "no role",
        {"prompt": RYE, "chosen": [{"content": YES}], "rejected": reply(NO)},
        r"chosen\[0\] must be a message with a role",
        fault=False,
    ),
    refused(
        "two shapes at once",
        {"prompt": RYE, "chosen": YES, "rejected": NO, "response1": NO, "response2": YES},
        "holds both chosen [+] rejected and response1 [+] response2",
    ),
    refused(
        "two prompts",
        {"prompt": RYE, "question": "Is oat a grass?", "chosen": YES, "rejected": NO},
        "prompt and question, which differ",
    ),
    refused(
        "a side that opens with a reply and holds the prompt later",
        {"prompt": RYE, "chosen": [*reply("Hello"), *said(RYE, YES)], "rejected": [*reply("Hello"), *said(RYE, NO)]},
        "chosen opens a conversation",
    ),
    refused(
        "swift ends with the user", {"messages": said(RYE), "rejected_response": NO}, "messages ends with the user"
    ),
    refused(
        "an exchange of three",
        {"instruction": RYE, "history": [["a", "b", "c"]], "chosen": YES, "rejected": NO},
        "history must be",
    ),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_what_cannot_be_told_is_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        pair_from_json(row)
    assert re.search(reason, str(caught.value)), caught.value
