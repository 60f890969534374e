"""What a person or a pipe sees of judged rows: JSON lines, or readable text and a progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from rich.text import Text

from gramlite.console import console, progress
from gramlite.judging.pair import Order, Verdict
from gramlite.terminal import say_json, visible

from .shapes import identifier_text

if TYPE_CHECKING:
    from rich.console import RenderableType

WINNER_STYLES = {"A": "bold green", "B": "bold cyan", "tie": "bold yellow", None: "bold red"}
ORDER_TITLES = {"ab": "As given (A, then B)", "ba": "Swapped (B stands first, and is called A here)"}


class Display(ExitStack):
    """Shows rows as they are judged. Rows go to standard output, everything else to standard error.

    `quiet` keeps rows off standard output (they go to a file); `total` is how many rows are expected, if known;
    `readable` makes of a row what a person sees. Use it in a `with` block.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        quiet: bool = False,
        total: int | None = None,
        readable: Callable[[Mapping[str, Any]], RenderableType] | None = None,
    ) -> None:
        super().__init__()
        self._quiet = quiet
        self._describe = readable or row_line
        self._readable = sys.stdout.isatty() and not as_json
        self._out = console()
        self._errors = console(stderr=True)
        self._streaming: Order | None = None
        self._line_ended = False
        self._progress = None
        if total is not None:
            on = self._errors if quiet or not self._readable else self._out
            self._progress = self.enter_context(progress(on=on))
            self._task = self._progress.add_task("Judging", total=total)

    @property
    def listener(self) -> Any:
        """Who is called with a rationale's text as it is written; None where nobody watches."""
        return self._show_text if self._readable else None

    def _show_text(self, order: Order, text: str) -> None:
        """Show the first order's rationale live; the other, decoded beside it, is shown when the verdict is."""
        if self._streaming is None:
            self._streaming = order
            self._out.print(Text(ORDER_TITLES[order], style="bold underline"))
        if order == self._streaming:
            self._out.print(Text(visible(text, lines=True)), end="", soft_wrap=True)
            self._line_ended = text.endswith("\n") if text else self._line_ended

    def advance(self) -> None:
        """Count a row that needs no judging."""
        if self._progress:
            self._progress.advance(self._task)

    def show(self, row: Mapping[str, Any], verdict: Verdict | None) -> None:
        """Show one judged row."""
        if not self._quiet:
            if not self._readable:
                say_json(row)
            elif verdict is not None and verdict.id is None:  # given by options, and alone
                self._show_pair(verdict)
            else:
                self._out.print(self._describe(row))
        elif row["verdict"] is None:
            self._errors.print(Text(visible(f"{row_name(row)}: {row['reason']}"), style="red"))
        self.advance()

    def _show_pair(self, verdict: Verdict) -> None:
        for order in verdict.orders:
            if order.rationale is None:
                continue
            if order.order != self._streaming:
                self._out.print(Text(ORDER_TITLES[order.order], style="bold underline"))
                self._out.print(Text(visible(order.rationale, lines=True)), soft_wrap=True)
            elif not self._line_ended:
                self._out.print()
            self._out.print()
        self._out.print(verdict_line(verdict))
        if verdict.flags:
            self._out.print(Text(f"Noticed in the input: {', '.join(map(visible, verdict.flags))}", style="yellow"))


def verdict_line(verdict: Verdict) -> Text:
    """The verdict of one pair in words: winner, probability, whether the orders agree."""
    if verdict.winner is None:
        return Text(f"No verdict: {visible(str(verdict.reason))}", style=WINNER_STYLES[None])
    if verdict.winner == "tie":
        line = Text("It is a tie", style=WINNER_STYLES["tie"])
    else:
        line = Text(f"Response {verdict.winner} is better", style=WINNER_STYLES[verdict.winner])
    probability = verdict.p_a if verdict.winner != "B" or verdict.p_a is None else 1 - verdict.p_a
    details = [] if probability is None else [f"probability {probability:.2f}"]
    if verdict.consistent is not None and verdict.orders:
        details.append("both orders agree" if verdict.consistent else "the orders disagree")
    if verdict.reason:
        details.append(visible(verdict.reason))
    return line.append(f" ({', '.join(details)})", style="not bold default")


def row_name(row: Mapping[str, Any]) -> str:
    """A row's id as text."""
    return "(no id)" if row["id"] is None else identifier_text(row["id"])


def row_line(row: Mapping[str, Any]) -> Text:
    """One row of a file on one line."""
    winner = row["verdict"]
    line = Text(f"{visible(row_name(row))[:40]:<40} ")
    line.append(f"{winner or '-':<4}", style=WINNER_STYLES[winner])
    if winner is None:
        return line.append(visible(str(row["reason"])), style="red")
    agreement = {True: "orders agree", False: "orders disagree", None: ""}[row["consistent"]]
    return line.append(f" p(A) {row['p_a']:.3f}  {agreement}")
