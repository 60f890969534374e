"""A run of a judge over rows: each is on disk before the next is begun, is shown, and is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gramlite.errors import SOME_ROWS_WITHOUT_VERDICT, InputError
from gramlite.interrupt import resume_hint, say_on_interrupt
from gramlite.judging.pair import Pair, Verdict
from gramlite.storage import Inputs
from gramlite.terminal import note

from .journal import Journal, begun_here, check_rows, rows_kept
from .lines import Row

if TYPE_CHECKING:
    from gramlite.judging.judge import Judge

SUMMARY_WORDS = {"without verdict": "without a verdict (each row's reason says why)", "kept": "kept from before"}


@dataclass(frozen=True, kw_only=True)
class RowsOutput:
    """Where judged rows go: to the file at `path`, or where that is None to standard output."""

    path: Path | None = None
    resume: bool = False
    force: bool = False
    as_json: bool = False

    def prepare(self, inputs: Inputs) -> None:
        """Refuse the output before any work is done for it, and let an interrupt say from here on what is kept.

        Raises InputError for --resume without an output, and for what `check_rows` refuses.
        """
        if self.resume and not self.path:
            raise InputError("--resume goes on with an output file; add -o OUT.jsonl.")
        say_rows_on_interrupt(self.path)
        if self.path:
            check_rows(self.path, inputs, resume=self.resume, force=self.force)


def say_rows_on_interrupt(rows: Path | None, folder: Path | None = None) -> None:
    """Let an interrupt say how many rows are in a journal, or in its `folder`, and what to type to go on."""

    def words() -> str:
        if rows is None:
            return "Nothing was saved."
        return f"{rows_kept(rows)} rows are in {folder or rows}. {resume_hint(begun=begun_here(rows))}"

    say_on_interrupt(words)


def judge_record(judge: Judge) -> dict[str, Any]:
    """What all rows of a run depend on, as a journal keeps it."""
    return {"settings_hash": judge.settings_hash, "settings": judge.settings_record, "model": judge.model}


class Watcher(Protocol):
    """Who is shown each row as it is judged, and told of each that need not be."""

    def show(self, row: Mapping[str, Any], verdict: Verdict | None) -> None: ...

    def advance(self) -> None: ...


class JudgedRun(ExitStack):
    """Rows that a judge makes, kept in `output` and shown to a `watcher`. Use it in a `with` block.

    `record` is what the rows depend on, `judge_record` unless given; a resumed run must have the same. `kept` counts
    the rows of before by their input's digest, `tally` says how many rows became what.
    Raises InputError and IntegrityError for an output that is refused; see Journal.
    """

    def __init__(
        self, judge: Judge, output: RowsOutput, watcher: Watcher, record: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.judge = judge
        self.output = output
        self.tally: Counter[str] = Counter()
        self._watcher = watcher
        self._journal: Journal | None = None
        if output.path:
            record = record or judge_record(judge)
            journal = Journal(output.path, record=record, resume=output.resume, force=output.force)
            self._journal = self.enter_context(journal)
        self.kept = self._journal.kept if self._journal else Counter[str]()
        self._to_skip = self.kept.copy()

    def skips(self, digest: str) -> bool:
        """Whether this input's row is there from before; each row of before lets one input be skipped."""
        if not self._to_skip[digest]:
            return False
        self._to_skip[digest] -= 1
        self.tally["kept"] += 1
        self._watcher.advance()
        return True

    def add(self, row: Mapping[str, Any], verdict: Verdict | None = None) -> None:
        """Write a row to disk, then show and count it."""
        if self._journal:
            self._journal.append(row)
        self._watcher.show(row, verdict)
        self.tally["without verdict" if row["verdict"] is None else "judged"] += 1

    def judge_pairs(self, rows: Iterable[Row[Pair]], *, lookahead: bool = True) -> None:
        """Judge the pairs that are not kept and add a row for each, in input order, unreadable ones too."""
        waiting: list[Row[Pair]] = []  # rows read and not yet added

        def add_unreadable() -> None:
            while waiting and waiting[0].value is None:
                row = waiting.pop(0)
                self.add(self._unreadable(row))

        def pairs() -> Iterator[Pair]:
            for row in rows:
                if self.skips(row.digest):
                    continue
                waiting.append(row)
                if row.value is not None:
                    yield row.value
                elif len(waiting) == 1:
                    add_unreadable()

        for verdict in self.judge.many(pairs(), lookahead=lookahead):
            row = waiting.pop(0)
            output = {**verdict.to_json(), "line": row.number, "input": row.digest}
            if verdict.winner is None:
                output["reason"] = f"line {row.number}: {verdict.reason}"
            self.add(output, verdict)
            add_unreadable()

    def _unreadable(self, row: Row[Pair]) -> dict[str, Any]:
        verdict = Verdict(
            id=row.id,
            winner=None,
            p_a=None,
            margin=None,
            consistent=None,
            reason=row.error,
            model=self.judge.model,
            settings=self.judge.settings_hash,
        )
        return {**verdict.to_json(), "line": row.number, "input": row.digest}

    def finish(self) -> int:
        """Say on standard error what became of the rows; returns the exit code."""
        parts = [f"{self.tally['judged']:,} judged"]
        parts += [f"{self.tally[name]:,} {words}" for name, words in SUMMARY_WORDS.items() if self.tally[name]]
        if self.output.path or self.tally["without verdict"]:
            note(", ".join(parts) + (f". Rows are in {self.output.path}" if self.output.path else "") + ".")
        return SOME_ROWS_WITHOUT_VERDICT if self.tally["without verdict"] else 0
