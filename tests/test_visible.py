"""What is visible of a text, and that nothing prints but what makes texts visible first."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from hostile import DRIVES, HOSTILE

from gramlite.terminal import json_line, visible

ROOT = Path(__file__).parents[1]
fault = pytest.mark.fault("terminal")
OWN = {"gramlite/terminal.py", "gramlite/console.py"}
RICH = {"Console", "Table", "Progress", "TextColumn", "Live", "Panel", "Prompt"}


def calls_and_imports(path: Path) -> list[str]:
    """What a file prints by itself, or takes from rich to print with; what it does as a program of its own is left out."""
    found = []
    tree = ast.parse(path.read_text())
    tree.body = [top for top in tree.body if not (isinstance(top, ast.If) and "__name__" in ast.unparse(top.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
            found += [alias.name for alias in node.names if alias.name in RICH | {"print"}]
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "rich"]
        if isinstance(node, ast.Call):
            function = node.func
            owner = function.value if isinstance(function, ast.Attribute) else None
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            ours = isinstance(owner, ast.Name) and owner.id == "click"
            if (name == "print" and owner is None) or (ours and name in ("echo", "secho")) or name == "from_markup":
                found.append(name)
    return found


@fault
def test_nothing_else_prints() -> None:
    """Use `say`, `say_json` and `note` of gramlite.terminal, and the tables and bars of gramlite.console."""
    unwanted = {
        str(path.relative_to(ROOT)): found
        for package in ("gramlite", "export", "quant", "bench")
        for path in sorted((ROOT / package).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in OWN and (found := calls_and_imports(path))
    }
    progress_type = {"bench/progress.py": ["Progress"]}  # the type of what gramlite.console makes
    assert unwanted == progress_type


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [b] text :bug: ümläut 漢字 \u00a0", None),
        pytest.param("می‌خواهم PDF‌ها क्‍ष 👩‍💻 🏳️‍🌈", None, marks=fault),
        pytest.param("pay\u200dpal\u200c", r"pay\u200dpal\u200c", marks=fault),
        pytest.param("a\x00\x1b\x7f\x9b\r\n\t", r"a\x00\x1b\x7f\x9b\r\n\t", marks=fault),
        pytest.param("\u202e\u2066\u200f\ufeff\u00ad\u2028", r"\u202e\u2066\u200f\ufeff\xad\u2028", marks=fault),
        pytest.param("\U000e0041 \udce4.gguf", r"\U000e0041 \udce4.gguf", marks=fault),
    ],
)
def test_what_is_visible(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown) == visible(visible(text))


@fault
def test_prose_keeps_its_lines_and_json_its_values() -> None:
    assert visible("a\n\tb\u200d\x1b", lines=True) == "a\n\tb\u200d\\x1b"
    assert visible("\u200d", lines=True) == "\u200d", "the second half of an emoji that came in two pieces"
    value = {"x": HOSTILE, "y": "\udce4\U000e0041 می‌خواهم"}
    assert json.loads(json_line(value)) == value and not DRIVES.search(json_line(value))
