"""Files that are no JSON lines: read, or refused by name before a model is loaded."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gramlite.cli import run
from gramlite.errors import InputError

LINE_SEPARATOR = "\u2028"
ROWS = [
    {
        "id": f"r{n}",
        "prompt": f"Frage {n}: Äpfel?",
        "response_a": f'ja,{LINE_SEPARATOR} "{n}"',
        "response_b": f"nein\n{n}",
    }
    for n in range(30)
]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


READ: dict[str, tuple[str, bytes]] = {
    "an array": ("pairs.json", json.dumps(ROWS).encode()),
    "an array over several lines": ("pairs.jsonl", json.dumps(ROWS, indent=2).encode()),
    "an array with a byte order mark": ("pairs.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
    "gzip": ("pairs.jsonl.gz", gzip.compress(JSON_LINES.encode())),
    "gzip by another name": ("pairs.jsonl", gzip.compress(JSON_LINES.encode())),
    "gzip in two parts": ("p", gzip.compress(JSON_LINES.encode()[:999]) + gzip.compress(JSON_LINES.encode()[999:])),
    "a gzipped array": ("pairs.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "bzip2": ("pairs.jsonl.bz2", bz2.compress(JSON_LINES.encode())),
    "xz": ("pairs.jsonl.xz", lzma.compress(JSON_LINES.encode())),
    "UTF-16": ("pairs.jsonl", JSON_LINES.encode("utf-16")),
    "UTF-16, big end first": ("pairs.jsonl", b"\xfe\xff" + JSON_LINES.encode("utf-16-be")),
    "UTF-16 without a mark": ("pairs.jsonl", JSON_LINES.encode("utf-16-le")),
    "UTF-32": ("pairs.jsonl", JSON_LINES.encode("utf-32")),
    "an array in UTF-16": ("pairs.json", json.dumps(ROWS).encode("utf-16")),
    "CSV": ("pairs.csv", table(ROWS).encode()),
    "CSV with a byte order mark": ("pairs.csv", table(ROWS).encode("utf-8-sig")),
    "CSV with semicolons": ("pairs.csv", table(ROWS, ";").encode()),
    "CSV in UTF-16": ("pairs.csv", table(ROWS, "\t").encode("utf-16")),
    "tabs": ("pairs.tsv", table(ROWS, "\t").encode()),
    "CSV by another name, gzipped": ("pairs.txt", gzip.compress(table(ROWS).encode())),
}


def judged(path: Path, model: Path, output: Path, *more: str) -> int:
    return run(["judge", str(path), "-m", str(model), "--mode", "direct", "-o", str(output), *more])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stripped(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "input"}


@pytest.mark.fault("input-formats")
@pytest.mark.parametrize("kind", READ)
def test_a_file_of_another_kind_gives_the_rows_of_json_lines(kind: str, tmp_path: Path, scripted: Path) -> None:
    name, data = READ[kind]
    (tmp_path / "expected").mkdir()
    plain = tmp_path / "expected" / "pairs.jsonl"
    plain.write_text(JSON_LINES, encoding="utf-8", newline="")
    assert judged(plain, scripted, tmp_path / "expected.jsonl") == 0
    (tmp_path / name).write_bytes(data)
    assert judged(tmp_path / name, scripted, tmp_path / "out.jsonl") == 0
    expected, found = rows_of(tmp_path / "expected.jsonl"), rows_of(tmp_path / "out.jsonl")
    assert list(map(stripped, found)) == list(map(stripped, expected)) and [row["line"] for row in found] == list(
        range(1, 31)
    )
    assert len({row["input"] for row in found}) == 30, "each row has a digest of its own"
    assert judged(tmp_path / name, scripted, tmp_path / "out.jsonl", "--resume") == 0
    assert rows_of(tmp_path / "out.jsonl") == found


@pytest.mark.fault("input-formats")
def test_the_digest_is_of_the_lines_bytes_or_of_canonical_json(tmp_path: Path) -> None:
    import hashlib

    from gramlite.rows import Lines, read_rows

    row, line = {"prompt": "ä", "id": 7.0, "response_b": "y", "response_a": "x"}, '{"id": 7.0, "prompt": "ä"}'
    canonical = '{"id":7.0,"prompt":"\\u00e4","response_a":"x","response_b":"y"}'
    for text, digested in ((json.dumps([row]), canonical), (json.dumps([row], indent=1), canonical), (line, line)):
        (tmp_path / "f").write_bytes(gzip.compress(text.encode()))
        with Lines(tmp_path / "f") as lines:
            assert [found.digest for found in read_rows(lines)] == [hashlib.sha256(digested.encode()).hexdigest()[:16]]


ZSTD = b"\x28\xb5\x2f\xfd" + bytes(20)
GZIP = gzip.compress(JSON_LINES.encode())
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "an array that is cut short": (
        "pairs.json",
        json.dumps(ROWS, indent=1).encode()[:-9],
        "JSON over several lines that cannot be read",
    ),
    "gzip that is cut short": ("pairs.jsonl.gz", GZIP[:-20], "damaged or cut short"),
    "gzip that is damaged": ("pairs.jsonl.gz", GZIP[:200] + b"\0\0\0\0" + GZIP[204:], "damaged or cut short"),
    "a spreadsheet": ("pairs.xlsx", b"PK\x03\x04" + bytes(50), "a zip archive or a spreadsheet. Unpack it"),
    "Arrow": ("pairs.arrow", b"ARROW1\0\0" + bytes(50), "an Arrow file"),
    "UTF-16 of half a letter": ("pairs.jsonl", JSON_LINES.encode("utf-16")[:-1], "is no UTF-16"),
    "CSV of another encoding": (
        "pairs.csv",
        table(ROWS).encode("latin-1", "replace"),
        "Save the table as CSV in UTF-8",
    ),
    "CSV with a cell too many": (
        "pairs.csv",
        table(ROWS).encode() + b"r9,a,b,c,d\n",
        "row 31: 5 cells, and the header names 4",
    ),
    "CSV with a column twice": ("pairs.csv", b"prompt,response_a,response_b,prompt\na,b,c,d\n", "a column twice"),
    "CSV without a quote's end": ("pairs.csv", b'prompt,response_a,response_b\n"a,b,c\n', "no valid CSV"),
    "CSV of other columns": (
        "pairs.csv",
        b"text,left,right\na,b,c\n",
        "line 1: unknown shape (keys: left, right, text). Accepted: prompt",
    ),
    "text": ("notes.txt", b"Dear all,\n\nhello\n", "line 1: not valid JSON"),
    "bytes": ("model.bin", bytes(range(128, 256)) * 9, "line 1: not valid UTF-8"),
    "rows of another shape": (
        "rows.jsonl",
        b'{"text": "a"}\n' * 50,
        "line 1: unknown shape (keys: text). Accepted: prompt + response_a",
    ),
    "one row of another shape": (
        "rows.json",
        json.dumps({"data": ROWS}, indent=1).encode(),
        "line 1: unknown shape (keys: data)",
    ),
    "items to rank": (
        "items.jsonl",
        b'{"prompt": "q", "completions": ["a", "b"]}\n' * 3,
        "line 1: a row with completions is for `gramlite rank`",
    ),
    "lines of arrays": ("rows.jsonl", b'["q", "a", "b"]\n' * 3, "line 1: a JSON object is needed, not list"),
}


@pytest.fixture
def unloadable(tmp_path: Path) -> Path:
    """A model that ends in exit code 3 as soon as it is opened."""
    path = tmp_path / "unloadable.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.mark.fault("input-formats")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_before_a_model_is_loaded(
    kind: str, tmp_path: Path, unloadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, says = REFUSED[kind]
    (tmp_path / name).write_bytes(data)
    assert judged(tmp_path / name, unloadable, tmp_path / "out.jsonl") == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert name in errors and says in errors and not (tmp_path / "out.jsonl").exists()


@pytest.mark.fault("input-formats")
@pytest.mark.parametrize(
    ("data", "module", "says"),
    [
        (ZSTD, "backports.zstd", "pairs is compressed with zstd. Unpack it: zstd -d FILE"),
        (b"PAR1" + bytes(50), "pyarrow.parquet", "pairs is a Parquet file. To read it: pip install pyarrow"),
    ],
    ids=["zstd", "parquet"],
)
def test_what_needs_a_package_names_it(
    data: bytes, module: str, says: str, tmp_path: Path, unloadable: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    (tmp_path / "pairs").write_bytes(data)
    assert judged(tmp_path / "pairs", unloadable, tmp_path / "out.jsonl") == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_parquet_is_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    from gramlite.rows import Lines, read_rows

    said = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": "x", "tool_calls": None},
    ]
    rows = [{"id": n, "chosen": said, "rejected": [said[0], {**said[1], "content": "y"}]} for n in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with Lines(tmp_path / "pairs.parquet") as lines:
        found = [row.value for row in read_rows(lines)]
    assert [(pair and (pair.id, pair.prompt, pair.response_a, pair.response_b)) for pair in found] == [
        (n, "q", "x", "y") for n in range(50)
    ]
    (tmp_path / "pairs.parquet").write_bytes((tmp_path / "pairs.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged or cut short"), Lines(tmp_path / "pairs.parquet") as lines:
        list(read_rows(lines))


@pytest.mark.skipif(not importlib.util.find_spec("backports"), reason="needs backports.zstd")
def test_zstd_is_read(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd")
    from gramlite.rows import Lines, read_rows

    data = zstd.compress(JSON_LINES.encode()[:999]) + zstd.compress(JSON_LINES.encode()[999:])
    (tmp_path / "pairs.zst").write_bytes(data)
    with Lines(tmp_path / "pairs.zst") as lines:
        assert [row.id for row in read_rows(lines)] == [row["id"] for row in ROWS]
    for damaged in (data[:-9], data[:200] + bytes(9) + data[209:]):
        (tmp_path / "pairs.zst").write_bytes(damaged)
        with pytest.raises(InputError, match="damaged or cut short"), Lines(tmp_path / "pairs.zst") as lines:
            list(read_rows(lines))


def test_a_strange_line_among_rows_does_not_stop_the_others(tmp_path: Path, scripted: Path) -> None:
    rows = [b"[1, 2]", b"hello", json.dumps(ROWS[0]).encode(), b"[", b'{"text": "a"}']
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(rows))
    assert judged(tmp_path / "pairs.jsonl", scripted, tmp_path / "out.jsonl") == 5
    assert [bool(row["verdict"]) for row in rows_of(tmp_path / "out.jsonl")] == [False, False, True, False, False]


def test_a_line_that_is_cut_short_is_a_row_without_a_verdict(tmp_path: Path, scripted: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "q", ')
    assert judged(tmp_path / "pairs.jsonl", scripted, tmp_path / "out.jsonl") == 5


def test_an_empty_cell_is_an_empty_response_and_no_id(tmp_path: Path) -> None:
    from gramlite.rows import Lines, read_rows

    (tmp_path / "pairs.csv").write_text("id,prompt,response_a,response_b,meta\n,q,x,,\n7,q,,y,\n")
    with Lines(tmp_path / "pairs.csv") as lines:
        pairs = [row.value for row in read_rows(lines) if row.value]
    assert [(pair.id, pair.response_a, pair.response_b) for pair in pairs] == [("1", "x", ""), ("7", "", "y")]


@pytest.mark.fault("input-formats")
@pytest.mark.parametrize("kind", ["an array", "gzip", "CSV", "UTF-16"])
def test_standard_input_may_be_of_another_kind(kind: str, scripted: Path) -> None:
    command = [sys.executable, "-m", "gramlite", "judge", "-", "-m", str(scripted), "--mode", "direct", "--json"]
    finished = subprocess.run(command, input=READ[kind][1], stdout=subprocess.PIPE, timeout=60)
    assert finished.returncode == 0
    assert [json.loads(line)["id"] for line in finished.stdout.splitlines()] == [row["id"] for row in ROWS]


@pytest.mark.fault("input-formats")
def test_standard_input_is_refused_before_a_model_is_loaded(unloadable: Path) -> None:
    command = [sys.executable, "-m", "gramlite", "judge", "-", "-m", str(unloadable)]
    finished = subprocess.run(command, input=b"PK\x03\x04" + bytes(50), stderr=subprocess.PIPE, timeout=60)
    assert finished.returncode == 2 and b"standard input is a zip archive" in finished.stderr


@pytest.mark.fault("input-formats")
def test_all_commands_read_the_same_files(tmp_path: Path, scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = [row | {"label": "AB"[n % 2]} for n, row in enumerate(ROWS)]
    (tmp_path / "pairs.csv").write_bytes(table(labelled).encode("utf-16"))
    assert (
        run(["bench", "run", f"pairs:{tmp_path / 'pairs.csv'}", "-m", str(scripted), "-o", str(tmp_path / "run")]) == 0
    )
    assert json.loads(capsys.readouterr().out)["rows"] == 30
    items = [{"id": n, "prompt": "q", "completions": ["a", "b"]} for n in range(3)]
    (tmp_path / "items.json").write_text(json.dumps(items, indent=1))
    assert run(["rank", str(tmp_path / "items.json"), "-m", str(scripted), "--mode", "direct", "--json"]) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2]
    assert run(["rank", str(tmp_path / "pairs.csv"), "-m", str(scripted)]) == 2
    assert "Accepted: prompt + completions" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("names", "is_head"),
    [
        (["prompt", "response_a", "response_b"], True),
        (["chosen", "rejected"], True),
        (["prompt", "completions"], True),
        (["prompt", "answer"], False),
        (["output_1", "output_2"], False),
        (["completions"], False),
    ],
)
def test_a_table_begins_with_the_columns_of_a_shape(names: list[str], is_head: bool) -> None:
    from gramlite.rows.shapes import is_table_head

    assert is_table_head(names) is is_head


def test_all_rows_are_counted(tmp_path: Path) -> None:
    """Those that are looked at for their kind, and those after them."""
    from functools import partial

    from gramlite.rows.files import PROBED_ROWS, Lines, check_kind
    from gramlite.rows.shapes import pair_from_json

    path = tmp_path / "pairs.jsonl"
    row = json.dumps({"prompt": "q", "response_a": "x", "response_b": "y"}) + "\n"
    path.write_text(row * (PROBED_ROWS + 5) + "\n")
    with Lines(path) as lines:
        assert check_kind(lines, partial(pair_from_json)) == PROBED_ROWS + 5
