"""Benchmark files on disk, one numbered record at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gramlite.errors import InputError
from gramlite.judging.pair import Identifier, Pair, Winner
from gramlite.rows import LabelError, Lines, identifier_of, label_of, read_lines
from gramlite.rows.labels import label_in, shown
from gramlite.storage import cache_folder

WHOLE_FOLDER = "."  # among a suite's FILES: a folder that is named is read as a whole
PLANTED = ("error", "error_key")  # which mistake RM-Bench planted: nothing that may travel with a pair

Record = dict[str, Any]


def find_file(path: Path | None, names: tuple[str, ...], source: str) -> Path:
    """The benchmark's file: `path`, one of `names` inside it, or one of `names` in the benchmarks folder.

    Raises InputError that says where to get the file and what it must look like.
    """
    folder = benchmarks_folder() if path is None else path
    if path is not None:
        for candidate in (path, path.with_name(f"{path.name}.gz")):
            if candidate.is_file():
                return candidate
    for name in names if path else [name for name in names if name != WHOLE_FOLDER]:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.exists():
                return candidate
    if path is None:
        wanted = " or ".join(name for name in names if name != WHOLE_FOLDER)
        raise InputError(f"There is no {wanted} in {folder}. {source} Then name it as SUITE:FILE, or put it there.")
    if path.is_dir():
        raise InputError(f"The folder {path} holds none of {', '.join(names)}. {source}")
    raise InputError(f"There is no file {path}. {source}")


def benchmarks_folder() -> Path:
    """Where suites look when no file is named: GRAMLITE_BENCHMARKS, else `benchmarks` in the cache folder."""
    import os

    override = os.environ.get("GRAMLITE_BENCHMARKS")
    return Path(override) if override else cache_folder() / "benchmarks"


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Each record with its number from 1: a line, or an element of a list; see `gramlite.rows.files` for the formats.

    Raises InputError that names the file and the line for what is not a JSON object.
    """
    with Lines(path) as lines:
        for line in read_lines(lines, lambda record, _: record):
            if line.value is None:
                raise InputError(f"{path}, {line.error} Is this the file that was published?")
            yield line.number, dict(line.value)


def read_pairs(path: Path, read: Callable[[Record, int, str], Iterable[Pair]]) -> Iterator[Pair]:
    """The pairs of a file: a record of gramlite's own schema is one, of another `read` makes them.

    `read` is given the record, its number from 1 and where it stands, as errors name it.
    """
    for number, record in read_records(path):
        where = f"{path.name}, record {number}"
        if is_plain(record):
            yield plain_pair(record, where)
        else:
            yield from read(record, number, where)


def text(record: Mapping[str, Any], key: str, where: str) -> str:
    """A string field; raises InputError that names the place."""
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string. Is this the official file?")
    return value


def label(record: Mapping[str, Any], key: str, meanings: Mapping[str, Winner], where: str, source: str) -> Winner:
    """A label by what its suite says that each JSON text means; raises InputError that names any other."""
    value = record.get(key)
    winner = meanings.get(json.dumps(value))
    if winner is None:
        known = ", ".join(meanings)
        raise InputError(f"{where}: {key} is {shown(value)}, and this suite's labels are {known}. {source}")
    return winner


def is_plain(record: Mapping[str, Any]) -> bool:
    """Whether a record has gramlite's own schema: id, subset, prompt, response_a, response_b, label, meta."""
    return {"prompt", "response_a", "response_b"} <= record.keys()


def plain_pair(record: Mapping[str, Any], where: str) -> Pair:
    """A record of gramlite's own schema as a pair, its subset under meta."""
    try:
        identifier, winner = identifier_of(record, where), label_of(record)
    except LabelError:
        said = shown(label_in(record)[1])
        raise InputError(
            f"{where}: the label {said} is not understood; in gramlite's own schema it is A, B or tie."
        ) from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    meta = {k: v for k, v in (record.get("meta") or {}).items() if k not in PLANTED}
    return make_pair(
        identifier=identifier,
        prompt=text(record, "prompt", where),
        response_a=text(record, "response_a", where),
        response_b=text(record, "response_b", where),
        label=winner,
        meta={"subset": str(record.get("subset") or "all"), **meta},
    )


def make_pair(
    *, identifier: Identifier, prompt: str, response_a: str, response_b: str, label: Winner | None, meta: Record
) -> Pair:
    """A labelled pair; `prompt_sha` in its meta is what rows with the same prompt share."""
    meta = {"prompt_sha": digest(prompt), **meta}
    return Pair(prompt, response_a, response_b, id=identifier, label=label, meta=meta)


def chosen_side(identifier: str) -> Winner:
    """The side of a chosen response: by a hash of the id, so that neither side is the usual one."""
    return "A" if hashlib.sha256(identifier.encode()).digest()[0] % 2 == 0 else "B"


def chosen_pair(*, identifier: str, prompt: str, chosen: str, rejected: str, meta: Record) -> Pair:
    """A pair of a chosen and a rejected response, sides assigned by `chosen_side`."""
    side = chosen_side(identifier)
    first, second = (chosen, rejected) if side == "A" else (rejected, chosen)
    return make_pair(identifier=identifier, prompt=prompt, response_a=first, response_b=second, label=side, meta=meta)


def digest(value: str) -> str:
    """16 hexadecimal digits of the sha256 of a text."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]
