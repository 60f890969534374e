"""Any row in any shape: never another id, a lost turn or a wrong side; what cannot be told is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramlite.errors import InputError
from gramlite.rows import item_from_json, pair_from_json, read_lines, read_rows

Turn = tuple[str, str]
Sides = tuple[list[Turn], list[Turn], list[Turn]]  # what both share, and what each goes on with

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).map(str.strip).filter(bool)
REPLIES = st.sampled_from(["assistant", "tool", "gpt", "observation", "Model"])


def headed(turns: list[Turn]) -> str:
    spoken = [("assistant" if role == "gpt" else role, text) for role, text in turns]
    return spoken[0][1] if len(spoken) == 1 else "\n\n".join(f"{role.capitalize()}: {text}" for role, text in spoken)


@st.composite
def exchanges(draw: st.DrawFn, asks: bool) -> list[Turn]:
    """Replies, and where `asks` perhaps more questions between them; a reply stands at the end."""
    turns: list[Turn] = []
    for _ in range(draw(st.integers(0, 2)) if asks else 0):
        turns += [(draw(REPLIES), draw(WORDS)), ("user", draw(WORDS))]
    turns += [("assistant", draw(WORDS)), ("tool", draw(WORDS))] if draw(st.booleans()) else []
    return [*turns, ("assistant", draw(WORDS))]


@st.composite
def conversations(draw: st.DrawFn) -> Sides:
    """Two conversations that part with a reply; all texts differ, so that each can be told from the others."""
    system = [("system", draw(WORDS))] if draw(st.booleans()) else []
    shared = [
        turn for _ in range(draw(st.integers(0, 2))) for turn in (("user", draw(WORDS)), (draw(REPLIES), draw(WORDS)))
    ]
    shared = [*system, *shared, ("user", draw(WORDS))]
    sides = draw(exchanges(draw(st.booleans()))), draw(exchanges(draw(st.booleans())))
    number = iter(range(100))
    return tuple([(role, f"{text} {next(number)}") for role, text in turns] for turns in (shared, *sides))  # type: ignore[return-value]


def messages(turns: list[Turn], parts: bool = False) -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns]


def sharegpt(turns: list[Turn]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in turns]


def rows_of(shared: list[Turn], first: list[Turn], second: list[Turn]) -> dict[str, dict[str, Any]]:
    """All rows that say so, by what they are like."""
    whole = {"chosen": messages(shared + first), "rejected": messages(shared + second)}
    replies = {"chosen": messages(first), "rejected": messages(second, parts=True)}
    asked = [index for index, (role, _) in enumerate(shared) if role == "user"]
    rows = {
        "alone": whole,
        "null": {"prompt": None, **whole},
        "empty": {"prompt": "", **whole},
        "first question": {"prompt": shared[asked[0]][1], **whole},
        "last question": {"prompt": shared[-1][1], **whole},
        "all of it": {"prompt": messages(shared), **whole},
        "the end of it": {"prompt": messages(shared[asked[-1] :]), **whole},
        "copied": {"prompt": shared[-1][1], **whole, "messages": whole["rejected"]},
        "replies": {"prompt": messages(shared, parts=True), **replies},
        "plain": {"prompt": messages(shared), "response_a": messages(first), "response_b": messages(second)},
        "context": {"context": messages(shared), "response1": messages(first), "response2": messages(second)},
        "sharegpt": {"conversations": sharegpt(shared), "chosen": sharegpt(first), "rejected": sharegpt(second)},
        "swift": {"messages": whole["chosen"], "rejected_messages": whole["rejected"]},
        "arena": {"conversation_a": whole["chosen"], "conversation_b": whole["rejected"]},
        "JSON text": {"chosen": json.dumps(whole["chosen"]), "rejected": json.dumps({"messages": whole["rejected"]})},
        "cut": {
            "prompt": messages(shared),
            "chosen": messages(shared[asked[-1] :] + first),
            "rejected": messages(shared[asked[-1] :] + second),
        },
        "split": {
            "messages": messages(shared[: asked[-1]]),
            "prompt": shared[-1][1],
            **replies,
        }
        if asked[-1]
        else whole,
    }
    if shared[0][0] == "system":
        later = {"chosen": messages(shared[1:] + first), "rejected": messages(shared[1:] + second)}
        rows |= {"system column": {"system": shared[0][1], **later}, "system twice": {"system": shared[0][1], **whole}}
    if len(second) == 1:
        rows["texts"] = {"prompt": messages(shared), "chosen": messages(first), "rejected": second[0][1]}
        if all(role != "user" for role, _ in first):
            rows["swift, a text"] = {"messages": whole["chosen"], "rejected_response": second[0][1]}
    return rows


@pytest.mark.fault("conversations")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(conversations())
def test_no_turn_is_lost_and_no_side_is_wrong(sides: Sides) -> None:
    shared, first, second = sides
    for name, row in rows_of(*sides).items():
        pair = pair_from_json(row)
        assert (pair.prompt, pair.response_a, pair.response_b) == (headed(shared), headed(first), headed(second)), name


@pytest.mark.fault("conversations")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(conversations())
def test_completions_lose_no_turn(sides: Sides) -> None:
    shared, first, second = sides
    for prompt in (messages(shared), shared[-1][1]):
        item = item_from_json({"prompt": prompt, "completions": [messages(shared + first), messages(shared + second)]})
        assert (item.prompt, item.completions) == (headed(shared), (headed(first), headed(second)))
    item = item_from_json(
        {"prompt": messages(shared), "completions": [messages(first), messages(second), messages(first)]}
    )
    assert (item.prompt, item.completions) == (headed(shared), (headed(first), headed(second), headed(first)))


@pytest.mark.fault("conversations")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(WORDS, min_size=2, max_size=6), WORDS)
def test_transcripts_lose_no_turn(texts: list[str], other: str) -> None:
    texts = texts[: len(texts) // 2 * 2]
    roles = ["Human", "Assistant"] * len(texts)
    turns = [(role, f"{text} {n}") for n, (role, text) in enumerate(zip(roles, texts, strict=False))]

    def written(turns: list[Turn]) -> str:
        return "".join(f"\n\n{role}: {text}" for role, text in turns)

    pair = pair_from_json({"chosen": written(turns), "rejected": written([*turns[:-1], ("Assistant", f"{other} -")])})
    assert (pair.prompt, pair.response_a, pair.response_b) == (headed(turns[:-1]), turns[-1][1], f"{other} -")


FEW = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.sampled_from(["a", "b", ""])), max_size=4
)


@pytest.mark.fault("conversations")
@settings(max_examples=600, deadline=None, derandomize=True)
@given(FEW, FEW, FEW, st.booleans())
def test_what_is_read_is_all_of_both_sides(
    shared: list[Turn], first: list[Turn], second: list[Turn], whole: bool
) -> None:
    """Also of conversations that repeat themselves, end anywhere or are equal: read whole, or refused."""
    sides = [shared + first, shared + second]
    if whole:
        row = {"chosen": messages(sides[0]), "rejected": messages(sides[1])}
    else:
        row = {"prompt": messages(shared), "chosen": messages(first), "rejected": messages(second)}
    try:
        pair = pair_from_json(row)
    except InputError:
        return
    if not whole and any(role not in ("assistant", "tool") for role, _ in (first[0], second[0])):
        return  # which of it is the prompt's is not said
    if not whole and shared in (first[: len(shared)], second[: len(shared)]):
        return  # a reply that says the same as the prompt, if it is one, looks like the whole conversation
    sides = [[turn for turn in side if turn != ("system", "")] for side in sides]  # which is none
    responses = pair.response_a, pair.response_b
    cuts = [
        cut
        for cut in range(1, min(map(len, sides)))
        if sides[0][:cut] == sides[1][:cut]
        and pair.prompt == headed(sides[0][:cut])
        and responses == (headed(sides[0][cut:]), headed(sides[1][cut:]))
    ]
    assert cuts and all(side[-1][0] in ("assistant", "tool") for side in sides)
    alike = next((n for n, (one, other) in enumerate(zip(*sides, strict=False)) if one != other), None)
    assert alike is None or alike in cuts


def test_most_conversations_are_read() -> None:
    """The property above may refuse: here it may not."""
    ask, say, call, found = ("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")
    for shared in ([ask], [ask, say, ask], [("system", "s"), ask]):
        for first, second in (
            ([say], [found]),
            ([say, call, found], [found]),
            ([say, call, found], [say, call, say]),
            ([say], [say]),
        ):
            pair_from_json({"prompt": messages(shared), "chosen": messages(first), "rejected": messages(second)})
            pair_from_json({"chosen": messages(shared + first), "rejected": messages(shared + second)})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", ""])},
    optional={"content": JSON, "tool_calls": JSON, "from": JSON, "value": JSON, "function_call": JSON},
)
VALUE = JSON | st.lists(MESSAGE, max_size=3) | st.text(max_size=5)
COLUMNS = "prompt response_a response_b chosen rejected messages conversations context history system question instruction input"
ROWS = st.dictionaries(
    st.sampled_from([*COLUMNS.split(), "completions", "response1", "response2", "rejected_response", "meta", "label"]),
    VALUE,
)


@pytest.mark.fault("ids")
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, JSON)
def test_any_row_keeps_its_id(row: dict[str, Any], identifier: Any) -> None:
    line = json.dumps(row | {"id": identifier}).encode()
    usable = isinstance(identifier, str | int | float) and (
        not isinstance(identifier, float) or math.isfinite(identifier)
    )
    expected = identifier if usable else "3"
    (read,) = read_rows(io.BytesIO(b"\n\n" + line))
    (ranked,) = read_lines(io.BytesIO(b"\n\n" + line), item_from_json)
    for found, made, error in ((read.id, read.value, read.error), (ranked.id, ranked.value, ranked.error)):
        assert found == expected and type(found) is type(expected)
        assert (made is None) == (error is not None) and (error or "line 3: ").startswith("line 3: ")
        if made:
            assert made.id == expected and type(made.id) is type(expected)
        if not usable and identifier is not None:
            assert made is None


@pytest.mark.fault("input-formats")
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(
        [
            b"",
            b"\x1f\x8b\x08",
            b"BZh9",
            b"\xfd7zXZ\0",
            b"\xff\xfe",
            b"\xfe\xff",
            b"\0\0\xfe\xff",
            b"[",
            b"{",
            b"\xef\xbb\xbf",
        ]
    ),
    st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-16", "surrogatepass")),
    st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.gz"]),
)
def test_any_file_gives_rows_or_is_refused(tmp_path: Path, magic: bytes, data: bytes, name: str) -> None:
    from gramlite.rows import Lines, check_kind

    (tmp_path / name).write_bytes(magic + data)
    try:
        with Lines(tmp_path / name) as lines:
            rows = list(read_rows(lines))
        with Lines(tmp_path / name) as lines:
            assert check_kind(lines, pair_from_json) == len(rows)
    except InputError as error:
        assert name in str(error)
    else:
        assert all((row.value is None) == bool(row.error) for row in rows)
