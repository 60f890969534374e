from __future__ import annotations

import io
import json
from typing import Any

import pytest

from gramlite.errors import InputError
from gramlite.judging.pair import Pair
from gramlite.rows import LINE_LIMIT_BYTES, pair_from_json, read_rows

GOOD = {"prompt": "q", "response_a": "x", "response_b": "y"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD | {"id": "7", "label": "B", "meta": {"k": 1}}, Pair("q", "x", "y", "7", "B", {"k": 1})),
        ({"prompt": "q", "chosen": "x", "rejected": "y"}, Pair("q", "x", "y", None, "A")),
        (
            {
                "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}],
                "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}],
            },
            Pair("q", "x", "y", None, "A"),
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "r"},
                    {"role": "user", "content": "s"},
                ],
                "chosen": [{"role": "assistant", "content": "x"}],
                "rejected": [{"role": "assistant", "content": "y"}],
            },
            Pair("User: q\n\nAssistant: r\n\nUser: s", "x", "y", None, "A"),
        ),
        (
            {"question": "q", "response_A": "x", "response_B": "y", "label": "B>A", "pair_id": "p"},
            Pair("q", "x", "y", "p", "B"),
        ),
        ({"instruction": "q", "output_1": "x", "output_2": "y", "preference": 2}, Pair("q", "x", "y", None, "B")),
        ({"instruction": "q", "input": "i", "output_1": "x", "output_2": "y"}, Pair("q\n\ni", "x", "y")),
        ({"input": "q", "output_1": "x", "output_2": "y", "label": "A"}, Pair("q", "x", "y", None, "A")),
    ],
)
def test_accepted_shapes(row: dict[str, Any], expected: Pair) -> None:
    assert pair_from_json(row) == expected


def test_ids_fall_back_to_the_line_number() -> None:
    rows = list(
        read_rows(io.BytesIO(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n  \n" + json.dumps(GOOD).encode()))
    )
    assert [(row.number, row.value.id if row.value else None) for row in rows] == [(1, "1"), (4, "4")]


BAD_LINES: dict[str, bytes] = {
    "not json": b"hello",
    "cut short": b'{"prompt": "q", "response_a": "x"',
    "an array": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "invalid utf-8": b'{"prompt": "\xff", "response_a": "x", "response_b": "y"}',
    "overlong utf-8": b'{"prompt": "\xc0\xaf", "response_a": "x", "response_b": "y"}',
    "lone surrogate": b'{"prompt": "\\ud800", "response_a": "x", "response_b": "y"}',
    "low surrogate in b": b'{"prompt": "q", "response_a": "x", "response_b": "\\udc00"}',
    "nul": b'{"prompt": "a\\u0000b", "response_a": "x", "response_b": "y"}',
    "nul in a response": b'{"prompt": "q", "response_a": "x\\u0000", "response_b": "y"}',
    "missing response": b'{"prompt": "q", "response_a": "x"}',
    "missing prompt": b'{"response_a": "x", "response_b": "y"}',
    "unknown keys": b'{"text": "q", "left": "x", "right": "y"}',
    "empty object": b"{}",
    "completions": b'{"prompt": "q", "completions": ["x", "y"]}',
    "prompt is a number": b'{"prompt": 3, "response_a": "x", "response_b": "y"}',
    "response is null": b'{"prompt": "q", "response_a": null, "response_b": "y"}',
    "response is a list": b'{"prompt": "q", "response_a": ["x"], "response_b": "y"}',
    "response is an object": b'{"prompt": "q", "response_a": {"x": 1}, "response_b": "y"}',
    "both empty": b'{"prompt": "q", "response_a": "", "response_b": "  "}',
    "meta is a string": b'{"prompt": "q", "response_a": "x", "response_b": "y", "meta": "m"}',
    "id is an object": b'{"prompt": "q", "response_a": "x", "response_b": "y", "id": {}}',
    "messages without content": b'{"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}',
    "no messages": b'{"prompt": "q", "chosen": [], "rejected": []}',
    "chosen is a number": b'{"prompt": "q", "chosen": 1, "rejected": "y"}',
    "field over a mebibyte": b'{"prompt": "q", "response_a": "x", "response_b": "' + b"y" * ((1 << 20) + 1) + b'"}',
    "line over the limit": b'{"prompt": "q", "x": "' + b"y" * (LINE_LIMIT_BYTES + 10) + b'"}',
    "nested too deeply": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "trailing text": b'{"prompt": "q", "response_a": "x", "response_b": "y"} and more',
    "single quotes": b"{'prompt': 'q', 'response_a': 'x', 'response_b': 'y'}",
    "a control character": b'{"prompt": "a\x01b", "response_a": "x", "response_b": "y"}',
}


def test_each_bad_line_is_named_and_the_others_go_on() -> None:
    good = json.dumps(GOOD).encode()
    lines = [good]
    for bad in BAD_LINES.values():
        lines += [bad, good]
    rows = list(read_rows(io.BytesIO(b"\n".join(lines))))
    assert len(rows) == 2 * len(BAD_LINES) + 1
    for row, name in zip(rows[1::2], BAD_LINES, strict=True):
        assert row.value is None and row.error and row.error.startswith(f"line {row.number}: "), name
    assert all(row.value for row in rows[::2])


def test_an_unknown_shape_names_the_accepted_ones() -> None:
    with pytest.raises(InputError, match="prompt \\+ response_a \\+ response_b.*instruction \\+ output_1"):
        pair_from_json({"text": "q"})
    with pytest.raises(InputError, match="gramlite rank"):
        pair_from_json({"prompt": "q", "completions": []})
