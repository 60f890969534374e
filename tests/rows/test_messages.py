"""Conversations as published files hold them, messages beside two responses, and transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from messages import NO, RYE, YES

from gramlite.errors import InputError
from gramlite.rows import pair_from_json
from gramlite.rows.conversations import transcript


@pytest.mark.fault("conversations")
def test_the_published_rows_are_read_or_refused_in_words(shared: Path) -> None:
    refused = {}
    for line in (shared / "faults/conversations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row.pop("overall_preference", None)  # a label of numbers means nothing by itself
        try:
            pair = pair_from_json(row)
        except InputError as error:
            refused[row["id"]] = str(error)
            continue
        assert pair.id == row["id"]
        for text in (pair.response_a, pair.response_b):
            assert text and "\n\nHuman:" not in text and text not in pair.prompt
    assert sorted(refused) == ["1", "ends_with_user"]


def test_messages_beside_two_responses_are_what_comes_before_them() -> None:
    """Whichever of the columns that may hold a side stands beside `messages`."""
    row = {"messages": [{"role": "user", "content": RYE}], "chosen": YES, "rejected": NO, "rejected_response": "Maybe."}
    pair = pair_from_json(row)
    assert (pair.prompt, pair.response_a, pair.response_b) == (RYE, YES, NO)


def test_a_system_text_stands_before_a_prompt_that_is_a_transcript() -> None:
    asked = f"\n\nHuman: {RYE}\n\nAssistant:"
    row = {"system": "Be kind.", "prompt": asked, "chosen": f"{asked} {YES}", "rejected": f"{asked} {NO}"}
    pair = pair_from_json(row)
    assert pair.prompt == f"System: Be kind.\n\nHuman: {RYE}"
    assert (pair.response_a, pair.response_b) == (YES, NO)


@pytest.mark.parametrize("text", ["Human: only asked", "Said first.\n\nAssistant: Yes.", "plain"])
def test_other_texts_are_no_transcripts(text: str) -> None:
    assert transcript(text) is None
