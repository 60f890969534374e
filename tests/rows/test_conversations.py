"""What of a row is the question and what each response, in the shapes that preference data is published in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from messages import (
    CALLED,
    CHOSEN_CALL,
    LONG,
    MUSEUM,
    MUSEUM_SIDES,
    MUSEUM_TEXT,
    NO,
    PICNIC,
    RYE,
    RYE_SIDES,
    TOOL,
    WEATHER,
    YES,
    calling,
    human,
    parts,
    reply,
    said,
)

from gramlite.rows import pair_from_json


def case(name: str, row: dict[str, Any], prompt: str, first: str = YES, second: str = NO, *, fault: bool = True) -> Any:
    marks = [pytest.mark.fault("conversations")] if fault else []
    return pytest.param(row, prompt, first, second, id=name, marks=marks)


READ = [
    case(
        "a longer history on one side",
        {"chosen": said(PICNIC, "Where?", "In the park.", "Bring bread."), "rejected": said(PICNIC, NO)},
        PICNIC,
        LONG,
    ),
    case(
        "a longer history on the other",
        {"chosen": said(PICNIC, YES), "rejected": said(PICNIC, "Where?", "In the park.", "Bring bread.")},
        PICNIC,
        YES,
        LONG,
    ),
    case("the prompt is the last turn", {"prompt": MUSEUM[2], **MUSEUM_SIDES}, MUSEUM_TEXT),
    case("the prompt is the first turn", {"prompt": MUSEUM[0], **MUSEUM_SIDES}, MUSEUM_TEXT),
    case("the prompt is the last turn, as a list", {"prompt": said(MUSEUM[2]), **MUSEUM_SIDES}, MUSEUM_TEXT),
    case("the prompt is the whole history", {"prompt": said(*MUSEUM), **MUSEUM_SIDES}, MUSEUM_TEXT, fault=False),
    case(
        "the prompt is what comes before",
        {"prompt": said(*MUSEUM[:2]), "chosen": said(MUSEUM[2], YES), "rejected": said(MUSEUM[2], NO)},
        MUSEUM_TEXT,
    ),
    case(
        "the prompt ends in the sides' first turn",
        {"prompt": said("#Be brief.", RYE), **RYE_SIDES},
        f"System: Be brief.\n\nUser: {RYE}",
        fault=False,
    ),
    case(
        "the prompt stands in both after they differ",
        {"prompt": "And?", "chosen": said(RYE, "a", "And?", YES), "rejected": said(RYE, "b", "And?", NO)},
        RYE,
        "Assistant: a\n\nUser: And?\n\nAssistant: Yes.",
        "Assistant: b\n\nUser: And?\n\nAssistant: No.",
    ),
    case(
        "system text in the sides alone",
        {"prompt": RYE, "chosen": said("#Be brief.", RYE, YES), "rejected": said("#Be brief.", RYE, NO)},
        f"System: Be brief.\n\nUser: {RYE}",
    ),
    case(
        "system text in a column",
        {"system": "Be brief.", "question": RYE, "chosen": YES, "rejected": NO},
        f"System: Be brief.\n\nUser: {RYE}",
    ),
    case(
        "system text in a column and in the sides",
        {"system": "Be brief.", "chosen": said("#Be brief.", RYE, YES), "rejected": said("#Be brief.", RYE, NO)},
        f"System: Be brief.\n\nUser: {RYE}",
        fault=False,
    ),
    case(
        "system text beside plain responses",
        {"system": "Be brief.", "prompt": RYE, "response_a": YES, "response_b": NO},
        f"System: Be brief.\n\nUser: {RYE}",
    ),
    case(
        "an empty system message",
        {
            "prompt": RYE,
            "chosen": [{"role": "system", "content": ""}, *said(RYE, YES)],
            "rejected": [{"role": "system", "content": None}, *said(RYE, NO)],
        },
        RYE,
    ),
    case("SHP", {"history": RYE, "human_ref_A": YES, "human_ref_B": NO}, RYE),
    case("an empty system text", {"system": "", "question": RYE, "chosen": YES, "rejected": NO}, RYE),
    case("no prompt", {"prompt": None, **RYE_SIDES}, RYE),
    case("an empty prompt", {"prompt": "", **RYE_SIDES}, RYE),
    case(
        "what differs begins with the user",
        {"chosen": said(RYE, "a", "b", YES), "rejected": said(RYE, "a", "c", NO)},
        f"User: {RYE}\n\nAssistant: a",
        "User: b\n\nAssistant: Yes.",
        "User: c\n\nAssistant: No.",
    ),
    case(
        "both sides are the same",
        {"chosen": said(*MUSEUM, YES), "rejected": said(*MUSEUM, YES)},
        MUSEUM_TEXT,
        YES,
        YES,
        fault=False,
    ),
    case(
        "both replies are the same",
        {"prompt": RYE, "chosen": reply(YES), "rejected": reply(YES)},
        RYE,
        YES,
        YES,
        fault=False,
    ),
    case(
        "the same beginning of two replies",
        {"prompt": WEATHER, "chosen": CHOSEN_CALL, "rejected": [*CHOSEN_CALL[:2], *reply("Sunny.")]},
        'User: Weather in Oslo?\n\nAssistant: weather({"city": "Oslo"})\n\nTool: 3 C, rain',
        "3 degrees.",
        "Sunny.",
    ),
    case(
        "a reply that goes on after a tool",
        {"prompt": WEATHER, "chosen": CHOSEN_CALL, "rejected": CHOSEN_CALL[:1]},
        "Weather in Oslo?",
        CALLED,
        'weather({"city": "Oslo"})',
    ),
    case(
        "tool calls without content",
        {"prompt": WEATHER, "chosen": CHOSEN_CALL, "rejected": reply("Sunny.")},
        "Weather in Oslo?",
        CALLED,
        "Sunny.",
    ),
    case(
        "tool calls with empty content, arguments as text",
        {
            "prompt": WEATHER,
            "chosen": [calling('{"city": "Oslo"}', ""), TOOL, *reply("3 degrees.")],
            "rejected": reply("Sunny."),
        },
        "Weather in Oslo?",
        CALLED,
        "Sunny.",
    ),
    case(
        "tool calls with content",
        {"prompt": WEATHER, "chosen": [calling({}, "I look.")], "rejected": reply("Sunny.")},
        "Weather in Oslo?",
        "I look.\nweather({})",
        "Sunny.",
    ),
    case(
        "a function call of old",
        {
            "prompt": WEATHER,
            "chosen": [{"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}],
            "rejected": reply("Sunny."),
        },
        "Weather in Oslo?",
        "weather({})",
        "Sunny.",
    ),
    case(
        "other roles",
        {"chosen": [*said(RYE), {"role": "observation", "content": "o"}, *reply(YES)], "rejected": said(RYE, NO)},
        RYE,
        "Observation: o\n\nAssistant: Yes.",
    ),
    case(
        "an empty response",
        {"prompt": said(RYE), "chosen": reply(YES), "rejected": reply("")},
        RYE,
        YES,
        "",
        fault=False,
    ),
    case(
        "content in parts",
        {
            "prompt": [{"role": "user", "content": parts("Is rye ", "a grass?")}],
            "chosen": [{"role": "assistant", "content": parts(YES)}],
            "rejected": reply(NO),
        },
        RYE,
    ),
    case(
        "parts with an empty place for an image",
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": RYE, "image": None}]}],
            "chosen": YES,
            "rejected": NO,
        },
        RYE,
    ),
    case("a prompt of messages", {"prompt": said(RYE), "response_a": YES, "response_b": NO}, RYE),
    case("responses of messages", {"prompt": RYE, "response_a": reply(YES), "response_b": reply(NO)}, RYE),
    case("hh-rlhf", {"chosen": human(RYE, YES), "rejected": human(RYE, NO)}, RYE),
    case(
        "hh-rlhf, several turns",
        {"chosen": human(*MUSEUM, YES), "rejected": human(*MUSEUM, NO)},
        MUSEUM_TEXT.replace("User:", "Human:"),
    ),
    case(
        "hh-rlhf, beginnings that differ",
        {"chosen": human(RYE, "a", "b", YES), "rejected": human(RYE, NO)},
        RYE,
        "Assistant: a\n\nHuman: b\n\nAssistant: Yes.",
    ),
    case(
        "hh-rlhf, a mark within a line",
        {"chosen": human(RYE, "As Human: Yes."), "rejected": human(RYE, "a\nAssistant: b")},
        RYE,
        "As Human: Yes.",
        "a\nAssistant: b",
    ),
    case(
        "hh-rlhf, a role twice",
        {"chosen": human(RYE, YES) + "\n\nAssistant: Indeed.", "rejected": human(RYE, NO)},
        RYE,
        "Assistant: Yes.\n\nAssistant: Indeed.",
    ),
    case("hh-rlhf, an empty last reply", {"chosen": human(RYE, YES), "rejected": human(RYE, "")}, RYE, YES, ""),
    case(
        "hh-rlhf, the prompt too",
        {"prompt": human(RYE) + "\n\nAssistant:", "chosen": human(RYE, YES), "rejected": human(RYE, NO)},
        RYE,
    ),
    case(
        "hh-rlhf, the prompt of several turns",
        {"prompt": human(*MUSEUM), "chosen": human(*MUSEUM, YES), "rejected": human(*MUSEUM, NO)},
        MUSEUM_TEXT.replace("User:", "Human:"),
    ),
    case("an empty prompt of texts", {"prompt": "", "response_a": YES, "response_b": NO}, "", fault=False),
    case(
        "a transcript that is asked for",
        {"prompt": "Write a chat.", "chosen": human("Hi", YES), "rejected": human("Hi", NO)},
        "Write a chat.",
        human("Hi", YES),
        human("Hi", NO),
        fault=False,
    ),
    case(
        "JSON text of conversations", {"chosen": json.dumps(said(RYE, YES)), "rejected": json.dumps(said(RYE, NO))}, RYE
    ),
    case(
        "JSON text of conversations and tools",
        {
            "chosen": json.dumps({"messages": said(RYE, YES), "tools": []}),
            "rejected": json.dumps({"messages": said(RYE, NO), "tools": []}),
        },
        RYE,
    ),
    case(
        "JSON text that is asked for",
        {"prompt": "As JSON.", "chosen": json.dumps(said(RYE, YES)), "rejected": "[]"},
        "As JSON.",
        json.dumps(said(RYE, YES)),
        "[]",
        fault=False,
    ),
    case(
        "JSON text of a plain response",
        {"prompt": RYE, "response_a": json.dumps(said(RYE, YES)), "response_b": json.dumps(said(RYE, NO))},
        RYE,
        json.dumps(said(RYE, YES)),
        json.dumps(said(RYE, NO)),
        fault=False,
    ),
    case("orca pairs of Argilla", {"system": "", "input": RYE, "chosen": YES, "rejected": NO}, RYE),
    case(
        "alpaca",
        {"instruction": "Translate.", "input": "Good day", "chosen": "Bonjour", "rejected": "Hallo"},
        "Translate.\n\nGood day",
        "Bonjour",
        "Hallo",
    ),
    case("alpaca, nothing to translate", {"instruction": RYE, "input": "", "chosen": YES, "rejected": NO}, RYE),
    case(
        "alpaca with a history",
        {"instruction": MUSEUM[2], "history": [list(MUSEUM[:2])], "chosen": YES, "rejected": NO},
        MUSEUM_TEXT,
    ),
    case("chosen_response", {"instruction": RYE, "chosen_response": YES, "rejected_response": NO}, RYE),
    case(
        "ultrafeedback",
        {"prompt": RYE, **RYE_SIDES, "messages": said(RYE, YES), "score_chosen": 8.0, "score_rejected": 3.0},
        RYE,
        fault=False,
    ),
    case("axolotl", {"messages": said(*MUSEUM), "chosen": reply(YES)[0], "rejected": reply(NO)[0]}, MUSEUM_TEXT),
    case("axolotl, strings", {"messages": said(RYE), "chosen": YES, "rejected": NO}, RYE),
    case(
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": RYE}],
            "chosen": {"from": "gpt", "value": YES},
            "rejected": {"from": "gpt", "value": NO},
        },
        RYE,
    ),
    case(
        "sharegpt, several turns",
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            "chosen": {"from": "gpt", "value": YES},
            "rejected": {"from": "gpt", "value": NO},
        },
        "System: s\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
    ),
    case("swift", {"messages": said(*MUSEUM, YES), "rejected_response": NO}, MUSEUM_TEXT),
    case(
        "swift, tools after the question",
        {"messages": [*WEATHER, *CHOSEN_CALL], "rejected_response": "Sunny."},
        "Weather in Oslo?",
        CALLED,
        "Sunny.",
    ),
    case(
        "swift, a list after a text",
        {"messages": said(RYE, YES), "rejected_response": [*CHOSEN_CALL]},
        RYE,
        YES,
        CALLED,
    ),
    case("swift, two lists", {"messages": said(*MUSEUM, YES), "rejected_messages": said(*MUSEUM, NO)}, MUSEUM_TEXT),
    case("helpsteer3", {"context": said(RYE), "response1": YES, "response2": NO}, RYE),
    case("arena", {"conversation_a": said(RYE, YES), "conversation_b": said(RYE, NO)}, RYE),
    case(
        "arena, two turns",
        {"conversation_a": said("a", "b", "c", "d"), "conversation_b": said("a", "e", "c", "f")},
        "a",
        "Assistant: b\n\nUser: c\n\nAssistant: d",
        "Assistant: e\n\nUser: c\n\nAssistant: f",
    ),
    case("rewardbench 2, one of each", {"prompt": RYE, "chosen": [YES], "rejected": [NO]}, RYE),
    case(
        "PandaLM",
        {"instruction": "Translate.", "input": "Good day", "response1": "Bonjour", "response2": "Hallo"},
        "Translate.\n\nGood day",
        "Bonjour",
        "Hallo",
    ),
    case("Auto-J", {"scenario": "s", "prompt": RYE, "response 1": YES, "response 2": NO}, RYE),
    case(
        "columns of nulls", {"prompt": RYE, "response_A": YES, "response_B": NO, "chosen": None, "rejected": None}, RYE
    ),
]


@pytest.mark.parametrize(("row", "prompt", "first", "second"), READ)
def test_what_both_share_is_the_prompt_and_what_differs_the_response(
    row: dict[str, Any], prompt: str, first: str, second: str
) -> None:
    pair = pair_from_json(row)
    assert (pair.prompt, pair.response_a, pair.response_b) == (prompt, first, second)
