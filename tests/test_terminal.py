"""Terminal text is text: whatever a path, an id, a name or a label holds is shown as it is, or escaped."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import broken_gguf
import pytest
from gramlite.bench import speed
from gramlite.bench.gate import parse_gate
from gramlite.bench.progress import SweepProgress
from gramlite.bench.table import escaped
from gramlite.export.report import judge_command, print_artifact, print_notes
from gramlite.quant.report import LayerReport, QuantizationReport, print_report
from hostile import DRIVES, HOSTILE, NAME, NAMED, SHOWN

from gramlite import cli
from gramlite.cli import run
from gramlite.commands import doctor, pull, reference
from gramlite.formats.artifact import Manifest, hash_files, write_manifest

ROOT = Path(__file__).parents[1]
fault = pytest.mark.fault("terminal")

ID = "[red]a[/b]:bug:"
RICH_CODES = re.compile(r"\x1b\[\??[0-9;]*[A-Za-z]|\r")  # colours, and what a progress bar needs


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a command line on a wide terminal; returns the exit code and all that was printed, but for rich's own codes."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "600")

    def go(*words: object) -> tuple[int, str]:
        out, err = Terminal(), Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "argv", ["gramlite", *map(str, words)])
            code = run([str(word) for word in words])
        return code, RICH_CODES.sub("", out.text + err.text)

    return go


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / HOSTILE
    folder.mkdir(parents=True)
    return folder


def judge_at(folder: Path, name: str = HOSTILE) -> Path:
    """A scripted judge whose metadata and manifest bear a hostile name, too."""
    chat = (ROOT / "gramlite/data/reference/hf/chat_template.jinja").read_text()
    path = folder / "judge.json"
    metadata = {"chat_template": chat, "template": {"name": "gramlite"}}
    path.write_text(json.dumps({"format": "scripted", "name": name, "metadata": metadata}))
    write_manifest(path, Manifest(format="scripted", name=name, quantization=name, files=hash_files(path)))
    return path


def pairs_at(folder: Path, count: int = 6, *, bad: bool = True) -> Path:
    """Pairs with hostile ids and subsets; every third cannot be judged, unless told."""
    path = folder / "pairs.jsonl"
    rows = [
        {
            "id": f"{number}{ID}",
            "prompt": f"q{number}",
            "response_a": "x\0" if bad and number % 3 == 2 else "x",
            "response_b": "y",
            "label": "AB"[number % 2],
            "meta": {"subset": f"{number % 2}{HOSTILE}"},
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(printed: str, *shown: str) -> None:
    """Every expected text is there as it is, and nothing in all that was printed drives a terminal."""
    assert not DRIVES.search(printed), repr(printed)
    for text in shown:
        assert text in printed, printed


# --- every command, with hostile names --------------------------------------------------------------------------


@fault
def test_inspect(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    path = place / "judge.gguf"
    path.write_bytes(broken_gguf.build(broken_gguf.model_pieces(), broken_gguf.put("general.name", 8, HOSTILE)))
    code, printed = terminal("inspect", path)
    assert code == 0
    check(printed, f"/{SHOWN}/judge.gguf", f"name             {SHOWN}", "KV cache")
    code, printed = terminal("inspect", path, "--json")
    check(printed)
    assert json.loads(printed)["path"] == str(path) and json.loads(printed)["name"] == HOSTILE


@fault
def test_what_is_refused_is_named(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    pairs, model = pairs_at(place), judge_at(place)
    (place / "broken.gguf").write_bytes(b"nothing")
    (place / "folder").mkdir()
    for code, words, shown in (
        (2, ["judge", place / "nothing.jsonl", "-m", model], SHOWN),
        (3, ["judge", pairs, "-m", place / "broken.gguf"], SHOWN),
        (3, ["judge", pairs, "-m", place / "folder"], SHOWN),
        (3, ["judge", pairs, "-m", model, "--template", place / "none.toml"], SHOWN),
        (2, ["judge", pairs, "-m", model, "--mode", HOSTILE], SHOWN),
        (3, ["inspect", place / "nothing.gguf"], SHOWN),
        (2, ["bench", "run", f"pairs:{place}/none.jsonl", "-m", model, "-o", place / "run"], SHOWN),
        (2, ["bench", "run", "[red]\x1b[:x", "-m", model, "-o", place / "run"], r"[red]\x1b["),
        (2, ["bench", "compare", place / "run", place / "run"], SHOWN),
        (2, ["bench", "sweep", place, "--types", "F16", "--suite", "pairs:x", "-o", place / "out"], SHOWN),
        (2, ["export", "gguf", place / "folder", "-o", place / "out.gguf", HOSTILE], SHOWN),
        (2, [HOSTILE], SHOWN),
    ):
        found, printed = terminal(*words)
        assert found == code, (words, printed)
        check(printed, shown)


@fault
def test_judge(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    pairs, model = pairs_at(place), judge_at(place)
    code, printed = terminal("judge", pairs, "-m", model, "--mode", "direct")
    assert code == 5
    check(printed, *(f"{number}{ID}" for number in (0, 1, 3, 4)), "line 3: response_a holds a NUL")
    code, printed = terminal("judge", pairs, "-m", model, "--mode", "direct", "-o", place / "rows.jsonl")
    check(printed, f"Rows are in {place.parents[1]}/{SHOWN}/rows.jsonl.", "line 6: response_a holds a NUL")
    code, printed = terminal("judge", pairs, "-m", model, "--mode", "direct", "--json")
    check(printed)
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["model"]["name"] for row in rows] == [HOSTILE] * 6 and rows[0]["id"] == f"0{ID}"


@fault
def test_an_interrupt(place: Path, terminal: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gramlite.judging.judge.Judge.many", stop)
    words = ["judge", pairs_at(place), "-m", judge_at(place), "--mode", "direct", "-o", place / "rows.jsonl"]
    code, printed = terminal(*words)
    assert code == 130
    check(printed, f"{SHOWN}/rows.jsonl", "--resume")


@fault
def test_a_rationale_is_shown_as_it_is_but_for_controls(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    model = judge_at(place)
    script = json.loads(model.read_text()) | {"rationale": "[red]Gut\u202e[/b]\nنمی‌شود \x1b[2J 👩‍💻\n</think>"}
    model.write_text(json.dumps(script))
    write_manifest(model, Manifest(format="scripted", name="judge", files=hash_files(model)))
    code, printed = terminal("judge", "--prompt", "q", "--a", "x", "--b", "y", "-m", model)
    assert code == 0
    check(printed, "[red]Gut\\u202e[/b]\nنمی‌شود \\x1b[2J 👩‍💻")


@fault
def test_rank(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    model, items = judge_at(place), place / "items.jsonl"
    rows = [{"id": f"{n}{ID}", "prompt": "q", "completions": ["one" + HOSTILE, "two", "x\0"[: 1 + n]]} for n in (0, 1)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, printed = terminal("rank", items, "-m", model, "--mode", "direct", "--method", "full")
    check(printed, f"0{ID}", "one" + SHOWN.removesuffix(r"\n"))
    assert code in (0, 5) and f"1{ID}" in printed


@fault
def test_calibrate(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    model, pairs = judge_at(place), pairs_at(place, 60, bad=False)
    code, printed = terminal("calibrate", pairs, "-m", model, "--mode", "direct")
    assert code == 0, printed
    check(printed, f"Stored in {place.parents[1]}/{SHOWN}/judge.json.calibration.json.", "temperature")
    code, printed = terminal("calibrate", pairs, "-m", model, "--mode", "direct", "--json")
    check(printed)


@fault
def test_bench(place: Path, terminal: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = pairs_at(place, 12, bad=False), judge_at(place)
    runs = [place / f"one{NAME}", place / f"two{NAME}"]
    for folder in runs:
        code, printed = terminal("bench", "run", f"pairs:{pairs}", "-m", model, "--mode", "direct", "-o", folder)
        assert code == 0, printed
        check(printed, f"0{SHOWN}", f"1{SHOWN}")
    report = ["--report", place / "report.html", "--gate", "flips<=3", "--github", "--need", "5"]
    code, printed = terminal("bench", "compare", *runs, *report)
    check(printed, f"Compared with one{NAMED}", f"two{NAMED}", f"two{NAMED} by subset", f"{SHOWN}/report.html")
    page, markdown = ((place / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert NAMED in page and r"[red]\\x1b]0;t\\x07\\u202e" in markdown and not DRIVES.search(markdown)
    monkeypatch.setenv("COLUMNS", "110")
    code, printed = terminal("bench", "compare", *runs)
    check(printed, f"one{NAMED} ", f"two{NAMED} ", "│ no verdict ")
    code, printed = terminal("bench", "compare", *runs, "--json")
    check(printed)
    assert json.loads(printed)["run"] == f"two{NAME}"


@fault
def test_a_sweep(place: Path, terminal: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = pairs_at(place, 12, bad=False), judge_at(place)
    (place / "config.json").write_text("{}")
    types = f"base={model},{HOSTILE}={model}"
    asked = ["--types", types, "--suite", f"pairs:{pairs}", "-o", place / "out", "--page", place / "page.md"]
    code, printed = terminal("bench", "sweep", place, *asked)
    assert code == 0, printed
    check(printed, f"{SHOWN}: pairs, 12 pairs", f"Page: {place.parents[1]}/{SHOWN}/page.md", f"% with {SHOWN}")
    assert not DRIVES.search((place / "page.md").read_text()) and not DRIVES.search(
        (place / "out/results.md").read_text()
    )


@fault
def test_doctor_prints_what_to_type(
    monkeypatch: pytest.MonkeyPatch, place: Path, terminal: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setenv("GRAMLITE_CACHE", str(place))
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor.Finding("x", False, doctor.ONNX_INSTALL), doctor.check_cache))
    monkeypatch.setenv("COLUMNS", "60")
    code, printed = terminal("doctor")
    assert code == 0
    check(printed, "&& pip install 'gramlite[onnx-cuda]'\n", f"cache folder  {place.parents[1]}/{SHOWN}")


@fault
def test_what_is_written_is_told_with_what_to_type(
    place: Path, terminal: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place / f"out{NAME}.gguf"
    path.write_bytes(broken_gguf.valid_model())
    notes = {"notes": [HOSTILE]}
    manifest = Manifest(
        format="gguf",
        name=HOSTILE,
        quantization=HOSTILE,
        bits_per_weight=4.5,
        template={"name": HOSTILE},
        settings=notes,
    )
    report = QuantizationReport(
        output=path,
        layers=(LayerReport(name=HOSTILE, bits=4, error=1.0, plain_error=2.0),),
        seconds=1.0,
        peak_bytes=1,
        predicted_bytes=1,
        size_bytes=1,
        bits_per_weight=4.5,
    )
    out, err = Terminal(), Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        print_artifact(path, manifest, command=judge_command(path, manifest), as_json=False)
        print_report(report, manifest, as_json=False)
        print_notes(manifest)
    check(err.text, f"note: {SHOWN}\n")
    path_shown = f"{place.parents[1]}/{SHOWN}/out{NAMED}.gguf"
    check(
        out.text,
        f"file             {path_shown}\n",
        f"4.50 ({SHOWN})",
        f"template         {SHOWN}\n",
        f"(plain 2.00000) {SHOWN}\n",
    )
    assert out.text.count(f"gramlite judge PAIRS.jsonl -m '{path_shown}'\n") == 2, "whole, to be copied"
    built = {"path": str(path), "dtype": "Q8_0", "bytes": 5, "seconds": 1.0, "sha256": "1" * 64}
    monkeypatch.setattr(reference, "build", lambda *_, **__: built)
    code, printed = terminal("reference", "-o", path)
    check(printed, f"{path_shown}  Q8_0", f"Next: gramlite judge -m '{path_shown}' --prompt")
    chosen = pull.Selection(f"owner/{HOSTILE}", "1" * 40, (f"{HOSTILE}.gguf",), 5)
    monkeypatch.setattr(pull, "pull", lambda *_, **__: chosen)
    code, printed = terminal("pull", f"owner/{HOSTILE}", "-o", place)
    check(printed, f"owner/{SHOWN} at 111111111111", f"folder  {place.parents[1]}/{SHOWN}", f"{SHOWN}.gguf'")


@fault
def test_a_speed_report(terminal: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"median": 1.0, "low": 1.0, "high": 1.0}
    report = speed.SpeedReport({HOSTILE: times}, [], {}, {}, {"model": HOSTILE})
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    speed.show(report)
    check(RICH_CODES.sub("", out.text), f"│ {SHOWN} │", f"model {SHOWN}")


@fault
def test_a_gate_has_a_line_for_each_clause(place: Path, terminal: Callable[..., tuple[int, str]]) -> None:
    pairs, model = pairs_at(place, 12, bad=False), judge_at(place)
    runs = [place / f"one{NAME}", place / f"two{NAME}"]
    for folder in runs:
        terminal("bench", "run", f"pairs:{pairs}", "-m", model, "--mode", "direct", "-o", folder)
    assert len(parse_gate("margin<=-1,flips<=0")) == 2
    code, printed = terminal("bench", "compare", *runs, "--gate", "margin<=-1,flips<=0")
    assert code == 7
    check(printed, f"\nError: The gate failed.\nmargin<=-1: fail for two{NAMED}.")


# --- reports --------------------------------------------------------------------------------------------------


@fault
def test_a_name_makes_no_link_in_markdown() -> None:
    assert escaped("[x](https://y)") == r"[x\](https://y)" and escaped("![x][y]: z") == r"![x\][y\]: z"
    assert escaped("-3.0 [-4.1, 2.0] a|b_c <i>") == r"-3.0 [-4.1, 2.0] a\|b\_c \<i\>"


# --- above the bar --------------------------------------------------------------------------------------------


def screen(written: str) -> list[str]:
    """The lines of a terminal that was given a text: as much of one as a progress bar needs."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", written):
        if piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif piece.endswith("A") and piece.startswith("\x1b"):
            row = max(row - int(piece[2:-1] or 1), 0)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + piece + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@fault
@pytest.mark.parametrize("name", ["Q8_0", "[red]Q8_0[/b]"])
def test_a_note_goes_above_the_bar(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `run.py` and the backends say it: through the logger, while a sweep's bar stands."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    logger, handler = logging.getLogger("gramlite"), cli._StderrHandler()
    logger.addHandler(handler)
    try:
        with SweepProgress(types=2, pairs=10) as progress:
            progress.start(name)
            progress.judge("pairs", 10)
            logger.warning("No GPU answers [cuda]; judging runs on the CPU. \x1b[2J")
            progress.show({}, None)
            assert progress._bar is not None
            progress._bar.refresh()
            standing = screen(err.text)
    finally:
        logger.removeHandler(handler)
    assert standing[0] == r"No GPU answers [cuda]; judging runs on the CPU. \x1b[2J"
    assert standing[1].startswith(f"{name} (1 of 2), pairs ") and "1/20 pairs" in standing[1]
    assert not any(standing[2:])
