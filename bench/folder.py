"""Run folders: what `bench run` writes and `bench compare` reads.

    RUN/run.json          suite, settings, model, versions, hardware, times, counts and the official score
    RUN/rows.jsonl        the judged rows, each with its `label`, its `meta` (subset, prompt_sha) and its
    `seconds`

A file of judged rows from `gramlite judge -o`, or of gold margins, stands in for a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from gramlite.errors import InputError
from gramlite.judging.judge import mean_log_odds, winner_of
from gramlite.rows import LabelError, identifier_text, label_from
from gramlite.rows.journal import check_rows
from gramlite.rows.labels import shown
from gramlite.storage import Inputs, check_note

from .records import read_records

RECORD = "run.json"
ROWS = "rows.jsonl"
RUN_VERSION = 1
GOLD_KEYS = {"id", "margin_ab", "margin_ba"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that was read: its rows by id in the order they lie in, and what run.json records of it."""

    name: str
    path: Path
    rows: Mapping[str, Row]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Mapping[str, Any]:
        """The model of run.json, else of the first row."""
        recorded = self.record.get("model")
        return recorded if isinstance(recorded, dict) else next(iter(self.rows.values()), {}).get("model") or {}

    @property
    def suite(self) -> Mapping[str, Any]:
        recorded = self.record.get("suite")
        return recorded if isinstance(recorded, dict) else {}

    @property
    def seconds_per_pair(self) -> float | None:
        """The mean of the rows' seconds, None where they have none."""
        known = [row["seconds"] for row in self.rows.values() if is_number(row.get("seconds"))]
        return sum(known) / len(known) if known else None

    @property
    def size_bytes(self) -> int | None:
        """The size of the model on disk, where run.json has it."""
        size = self.model.get("bytes")
        return size if isinstance(size, int) else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: Path) -> Run:
    """Read a run folder or a file of rows; of several rows with one id the last counts.

    Raises InputError where there is nothing to read or no row in it, and for a label that is not understood.
    """
    rows_path = path / ROWS if path.is_dir() else path
    if not rows_path.is_file():
        what = f"The folder {path} holds no {ROWS}" if path.is_dir() else f"There is no run at {path}"
        raise InputError(f"{what}. Make one: gramlite bench run SUITE:FILE -m MODEL -o {path}")
    rows: dict[str, Row] = {}
    for row in _rows(rows_path):
        identifier = row.get("id")
        key = identifier_text(identifier)
        if key in rows and type(rows[key].get("id")) is not type(identifier):
            raise InputError(f"{rows_path}: the ids {identifier!r} and {rows[key].get('id')!r} differ in type alone.")
        rows[key] = row
    if not rows:
        raise InputError(f"{rows_path} holds no rows. Run it first: gramlite bench run ... -o {path}")
    record = read_record(path) if path.is_dir() else {}
    return Run(_name(path, record), path, rows, record)


def _name(path: Path, record: Mapping[str, Any]) -> str:
    name = record.get("name")
    if isinstance(name, str) and name:
        return name
    return path.name if path.is_dir() else path.name.removesuffix(".gz").removesuffix(".jsonl")


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".gz":
        found: Iterator[tuple[int, Row]] = read_records(path)
    else:
        found = _whole_rows(path)
    for number, row in found:
        try:
            row["label"] = label_from(row.get("label"))
        except LabelError:
            raise InputError(
                f"{path}, line {number}: the label {shown(row['label'])} is not understood; a judged row's is A, B or tie. "
                "Correct it, or judge the pairs again: gramlite bench run pairs:FILE"
            ) from None
        if GOLD_KEYS <= row.keys():
            yield gold_row(row)
        elif "verdict" not in row and is_number(row.get("margin")):
            yield margin_row(row)
        elif "verdict" in row:
            yield row
        else:
            raise InputError(f"{path} holds a line that is no judged row (keys: {', '.join(sorted(row)[:6])}).")


def _whole_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The whole lines of a file that may end in a torn one."""
    from gramlite.rows.journal import read_journal

    return ((number, row) for number, (row, _) in enumerate(read_journal(path), 1) if row is not None)


def files_of(run: Run) -> list[Path]:
    """What a run was read from, and the file of its suite, whose texts a report shows."""
    suite = [Path(str(run.suite["path"]))] if run.suite.get("path") else []
    return [run.path / ROWS, run.path / RECORD, *suite] if run.path.is_dir() else [run.path, *suite]


def check_run_folder(folder: Path, inputs: Inputs = (), *, resume: bool, force: bool) -> None:
    """Refuse a run folder before any work is done for it.

    Raises InputError where it holds a run and neither `resume` nor `force` is set, and, even with them, where it holds
    files of these names that are not gramlite's.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is no folder. Choose another -o.")
    if (folder / ROWS).exists() and not (resume or force):
        raise InputError(f"{folder} holds a run. Add --resume to go on with it, or --force to start it anew.")
    rows = check_rows(folder / ROWS, inputs, resume=True, force=True)
    record = check_note(folder / RECORD, inputs, '"run_version"')
    if force and rows.exists() and not (record.exists() or rows.with_name(f"{ROWS}.run.json").exists()):
        raise InputError(f"{folder} holds a {ROWS} and no record of a run, so --force will not replace it.")


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder, empty where there is none; raises InputError for one that cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Delete it to compare the rows alone.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object. Delete it to compare the rows alone.")
    return value


def gold_row(record: Mapping[str, Any]) -> Row:
    """A gold verdict (un-swapped log-odds of both orders) as a judged row; its set becomes the subset."""
    margins = {"ab": float(record["margin_ab"]), "ba": float(record["margin_ba"])}
    margin = mean_log_odds(list(margins.values()))
    orders = [
        {"order": order, "verdict": winner_of(value), "p_a": probability(value), "margin": value}
        for order, value in margins.items()
    ]
    subset = str(record.get("set", "all")).removesuffix(".jsonl")
    consistent = orders[0]["verdict"] == orders[1]["verdict"]
    row = margin_row({"id": record["id"], "margin": margin, "label": record.get("label"), "meta": {"subset": subset}})
    return row | {"consistent": consistent, "orders": orders}


def margin_row(record: Mapping[str, Any]) -> Row:
    """A gold margin of both orders together, in nats, as a judged row."""
    margin = float(record["margin"])
    return {**record, "verdict": winner_of(margin), "p_a": probability(margin), "consistent": None, "orders": []}


def probability(margin: float) -> float:
    """The probability whose log-odds are `margin` nats."""
    return 1 / (1 + math.exp(-margin)) if margin >= 0 else math.exp(margin) / (1 + math.exp(margin))


def distinct_names(runs: list[Run]) -> list[Run]:
    """The same runs, those that share a name told apart by number."""
    seen: dict[str, int] = {}
    renamed = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        renamed.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} ({seen[run.name]})"))
    return renamed
