"""Messages as preference data has them, for tests of what is read of them."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, Any]]
RYE, YES, NO = "Is rye a grass?", "Yes.", "No."


def said(*turns: str) -> Messages:
    """Messages of a user and an assistant in turn, of the system where a text begins with a hash."""
    roles = ["system"] * turns[0].startswith("#") + ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text.removeprefix("#")} for role, text in zip(roles, turns, strict=False)]


def reply(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def calling(arguments: Any, content: Any = None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


MUSEUM = ("Is the museum open on Monday?", "No, it is shut.", "What about Tuesday?")
MUSEUM_TEXT = f"User: {MUSEUM[0]}\n\nAssistant: {MUSEUM[1]}\n\nUser: {MUSEUM[2]}"
MUSEUM_SIDES = {"chosen": said(*MUSEUM, YES), "rejected": said(*MUSEUM, NO)}
RYE_SIDES = {"chosen": said(RYE, YES), "rejected": said(RYE, NO)}
TOOL = {"role": "tool", "content": "3 C, rain"}
WEATHER = [{"role": "user", "content": "Weather in Oslo?"}]
PICNIC = "Plan a picnic."
LONG = "Assistant: Where?\n\nUser: In the park.\n\nAssistant: Bring bread."
CALLED = 'Assistant: weather({"city": "Oslo"})\n\nTool: 3 C, rain\n\nAssistant: 3 degrees.'
CHOSEN_CALL = [calling({"city": "Oslo"}), TOOL, *reply("3 degrees.")]


def human(*turns: str) -> str:
    return "".join(
        f"\n\n{role}: {text}" for role, text in zip(["Human", "Assistant"] * len(turns), turns, strict=False)
    )
