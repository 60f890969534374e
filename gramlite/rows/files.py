"""Files of rows as people have them, given line by line as JSON lines, or refused by name.

Read are JSON lines, JSON (an array of rows, or one row), CSV with a header, and Parquet where pyarrow is installed;
compressed by gzip, bzip2, xz, or zstd where Python has it; in UTF-8, UTF-16 or UTF-32. Rows of a file without lines
come as their canonical JSON, so that each has a digest.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from gramlite.errors import InputError

from .lines import LINE_LIMIT_BYTES, read_lines, whole_lines
from .shapes import is_table_head

COMPRESSED = {  # what files begin with, and the modules that unpack them
    b"\x1f\x8b": ("gzip",),
    b"BZh": ("bz2",),
    b"\xfd7zXZ\0": ("lzma",),
    b"\x28\xb5\x2f\xfd": ("compression.zstd", "backports.zstd"),
}
DAMAGES = {"zlib": "error", "lzma": "LZMAError", "compression.zstd": "ZstdError", "backports.zstd": "ZstdError"}
PARQUET = b"PAR1"
REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet. Unpack it (unzip FILE), or save the sheet as CSV",
    b"ARROW1": "an Arrow file. Save it as Parquet or as JSON lines",
}
COMPRESSED_NAMES = (".gz", ".bz2", ".xz", ".zst")
ACCEPTED = "Give JSON lines, a JSON array, CSV with a header or Parquet, compressed or not"
BLANK = b" \t\r\n\xef\xbb\xbf"
EMPTY_IS_NONE = ("id", "pair_id", "meta", "label")  # of CSV, which cannot tell an empty text from none
PROBED_ROWS = 20


class Lines:
    """A file, or standard input for "-", as JSON lines. Use it in a `with` block.

    Raises InputError for a file of another kind, at once where there is something to read, and for a damaged one.
    """

    def __init__(self, source: str | Path) -> None:
        self.name = "standard input" if source == "-" else str(source)
        try:
            self._file: Any = sys.stdin.buffer if source == "-" else Path(source).open("rb")
        except OSError as error:
            raise InputError(f"{self.name} cannot be read ({error.strerror}).") from error
        self._lines = self._read()
        if source != "-" or _is_ready(self._file):
            self._lines = chain([next(self._lines, b"")], self._lines)

    def readline(self, limit: int = -1, /) -> bytes:
        """The next line; of one that is too long, the next part."""
        return next(self._lines, b"")

    def close(self) -> None:
        """Close a file; standard input stays open."""
        if self._file is not sys.stdin.buffer:
            self._file.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> Iterator[bytes]:
        try:
            yield from _json_lines(self._file, self.name)
        except InputError:
            self.close()
            raise
        except _damages() as error:
            self.close()
            reason = isinstance(error, OSError) and error.strerror or f"damaged or cut short: {error}"
            raise InputError(f"{self.name} cannot be read ({reason}).") from error


def open_rows(source: str, build: Callable[[Mapping[str, Any], str], object]) -> tuple[Lines, int | None]:
    """A file, or standard input for "-", and how many rows it has; None where reading them all to count is no good.

    Raises InputError, before a model is loaded, for a file that `build` can make no row of.
    """
    path = Path(source)
    if source != "-" and not path.exists():
        raise InputError(f"There is no file {path}. Give a JSONL file of pairs, or - for standard input.")
    if source == "-" or not path.is_file():
        return Lines(source), None
    with Lines(path) as lines:
        count = check_kind(lines, build)
    return Lines(path), count


def check_kind(lines: Lines, build: Callable[[Mapping[str, Any], str], object]) -> int:
    """How many rows there are, as far as `build` need not tell; raises InputError where the first are all of no
    accepted shape, or no objects at all: the file is of another kind then, and nothing in it can be judged."""
    first = list(islice(read_lines(lines, build), PROBED_ROWS))
    if first and all(line.strange for line in first):
        raise InputError(f"{lines.name}, {first[0].error} {ACCEPTED}.")
    return len(first) + sum(1 for line in whole_lines(lines) if line.strip())


def _is_ready(stream: Any) -> bool:
    """Whether there is something to read: a producer that waits for a verdict's model must not be waited for."""
    try:
        return bool(select.select([stream], [], [], 0.2)[0])
    except (OSError, ValueError):  # no stream of the operating system's
        return False


def _damages() -> tuple[type[Exception], ...]:
    named = (getattr(sys.modules[module], error) for module, error in DAMAGES.items() if sys.modules.get(module))
    return EOFError, OSError, *named


def _json_lines(stream: Any, name: str, *, unpacked: bool = False) -> Iterator[bytes]:
    """The lines of a stream of any kind that is read."""
    stream = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    head = stream.peek(8)[:8]
    if not unpacked:
        for magic, modules in COMPRESSED.items():
            if head.startswith(magic):
                return _json_lines(_unpacked(stream, modules, name), name, unpacked=True)
    for magic, kind in REFUSED.items():
        if head.startswith(magic):
            raise InputError(f"{name} is {kind}.")
    if head.startswith(PARQUET):
        return _canonical(_parquet_rows(stream, name))
    encoding = json.detect_encoding(head)
    if encoding.startswith("utf-8"):
        return _records(iter(lambda: stream.readline(LINE_LIMIT_BYTES + 1), b""), name)
    return _records(_decoded(stream, encoding, name), name)


def _records(lines: Iterator[bytes], name: str) -> Iterator[bytes]:
    """JSON lines as they are; the rows of a JSON document or of a table as JSON lines."""
    blank, first = 0, b""
    for first in lines:
        if first.strip(BLANK):
            break
        blank += 1
    text, kind, ahead = first.strip(BLANK), _suffix(name), [first]
    if text[:1] not in (b"{", b"["):
        delimiter = _delimiter(text, kind)
        if delimiter:
            return _canonical(_table_rows(chain([first], lines), delimiter, name))
    elif not _is_json(text):
        if text[:1] == b"[" or text == b"{" or kind == ".json":
            return _canonical(_document(b"".join(chain([first], lines)), name))
    elif text[:1] == b"[":
        ahead.append(next(lines, b""))
        if not ahead[1].strip():
            return _canonical(_document(b"".join(chain(ahead, lines)), name))
    return chain(repeat(b"\n", blank), ahead, lines)  # lines of arrays too: refused one by one


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _document(text: bytes, name: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is JSON over several lines that cannot be read ({error}). {ACCEPTED}.") from None
    return value if isinstance(value, list) else [value]


def _suffix(name: str) -> str:
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_NAMES else path.suffix


def _delimiter(head: bytes, kind: str) -> str | None:
    """What separates the cells of a table that begins with the line `head`; None where that is no table's."""
    for delimiter in ",\t;":
        try:
            names = next(csv.reader([head.decode("utf-8")], delimiter=delimiter), [])
        except (csv.Error, UnicodeDecodeError):
            continue
        if is_table_head(names):
            return delimiter
    return {".csv": ",", ".tsv": "\t"}.get(kind)


def _table_rows(lines: Iterable[bytes], delimiter: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of CSV as objects of texts; an empty cell is an empty text, or none of what need not be there."""
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT_BYTES))
    number = 0
    try:
        cells = csv.reader((line.decode("utf-8") for line in lines), delimiter=delimiter, strict=True)
        head = [column.removeprefix("\ufeff").strip() for column in next(cells)]
        if len(set(head)) < len(head):
            raise InputError(f"{name} has a column twice: {', '.join(head)}.")
        for number, row in enumerate(filter(None, cells), 1):
            if len(row) != len(head):
                raise InputError(f"{name}, row {number}: {len(row)} cells, and the header names {len(head)}.")
            yield {column: cell for column, cell in zip(head, row, strict=True) if cell or column not in EMPTY_IS_NONE}
    except UnicodeDecodeError:
        raise InputError(f"{name}, after row {number}: not valid UTF-8. Save the table as CSV in UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{name}, after row {number}: no valid CSV ({error}).") from None


def _parquet_rows(stream: Any, name: str) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"{name} is a Parquet file. To read it: pip install pyarrow. Or save it as JSON lines: "
            "pandas.read_parquet(FILE).to_json('pairs.jsonl', orient='records', lines=True)"
        ) from None
    return _parquet_batches(parquet, stream if stream.seekable() else io.BytesIO(stream.read()))


def _parquet_batches(parquet: Any, stream: Any) -> Iterator[Any]:
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(PROBED_ROWS):
            yield from batch.to_pylist()
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise EOFError(str(error)) from error


def _unpacked(stream: Any, modules: Sequence[str], name: str) -> Any:
    for module in modules:
        try:
            return importlib.import_module(module).open(stream)
        except ImportError:
            continue
    kind = modules[-1].rpartition(".")[2]
    more = " Or let it be read: pip install backports.zstd" if kind == "zstd" else ""
    raise InputError(f"{name} is compressed with {kind}. Unpack it: {kind} -d FILE.{more}")


def _decoded(stream: Any, encoding: str, name: str) -> Iterator[bytes]:
    """Lines of another encoding in UTF-8; a lone surrogate stays one, which spoils its own line alone."""
    text = io.TextIOWrapper(stream, encoding, errors="surrogatepass", newline="\n")
    try:
        while line := text.readline(LINE_LIMIT_BYTES + 1):
            yield line.encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no {encoding.upper()} ({error.reason}). Save it as UTF-8.") from None
    finally:
        if not stream.closed:
            text.detach()  # whose end would close standard input


def _canonical(rows: Iterable[object]) -> Iterator[bytes]:
    """Each row as canonical JSON: sorted keys, no spaces, ASCII."""
    for row in rows:
        yield json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n"
