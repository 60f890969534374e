"""Runs every snippet of the documentation: Python blocks of a page in one namespace, shell blocks command by command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import gramlite
from gramlite.cli import run

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("adapters", "devices", "embedding", "ranking")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = ("json", "text")  # not run


def blocks(page: str) -> list[tuple[str, str, int]]:
    """Language, text and line of each fenced block."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [(match[1], match[2], text[: match.start()].count("\n") + 2) for match in BLOCK.finditer(text)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_q8: Path) -> Path:
    """A folder with the files that the pages name."""
    (tmp_path / "judge.gguf").symlink_to(reference_q8)
    questions = ["Name a colour.", "What is 2 + 2?", "Say hello in French.", "Name a prime number."]
    good, bad = ["Blue.", "It is 4.", "Bonjour !", "Seven is prime."], ["Seven.", "It is 5.", "Hola!", "Nine is."]
    labelled = [
        {"prompt": f"{questions[n % 4]} {n}", "response_a": good[n % 4], "response_b": bad[n % 4], "label": "A"}
        if n % 2
        else {"prompt": f"{questions[n % 4]} {n}", "response_a": bad[n % 4], "response_b": good[n % 4], "label": "B"}
        for n in range(20)
    ]
    items = [{"prompt": questions[n], "completions": [good[n], bad[n], "I don't know."]} for n in (0, 1)]
    for name, rows in (("labelled", labelled), ("pairs", labelled[:2]), ("items", items)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packaged = Path(gramlite.__file__).parent / "data/reference"
    for folder, source, names in (
        ("lora", packaged, ("adapter_config.json", "adapter_model.safetensors")),
        ("lora-code", packaged, ("adapter_config.json", "adapter_model.safetensors")),
        ("checkpoint", packaged / "hf", ("config.json",)),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(source / name, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SLOW_PAGES = ("ranking",)  # judges dozens of pairs with the reference judge


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW_PAGES else ()) for page in PAGES]
)
def test_snippets_run(page: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for language, text, line in blocks(page):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(DOCS / f"{page}.md"), "exec"), namespace)
        elif language == "sh":
            for command in text.splitlines():
                program, *arguments = shlex.split(command, comments=True) or [""]
                assert program in ("gramlite", ""), f"line {line} of {page}: only gramlite's own commands are run"
                code = run(arguments) if program else 0
                assert code == 0, f"{command}: exit {code}\n{capsys.readouterr().err}"
    if "judge" in namespace:
        namespace["judge"].close()


def test_every_page_with_python_is_run_and_every_block_is_known() -> None:
    for path in DOCS.glob("*.md"):
        languages = {language for language, _, _ in blocks(path.stem)}
        assert ("python" in languages) == (path.stem in PAGES), path.name
        assert path.stem not in PAGES or languages <= {"python", "sh", *SHOWN}, path.name


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (DOCS / f"{page}.md").read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{page}.md links to {target}"
