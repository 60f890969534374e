"""The layout of the source: which folder may import which, no circles, one name for one thing, files of a readable size.

The source is read and never imported, so that imports inside functions count and no package need be installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAPPED = ("export", "quant", "bench")  # folders beside gramlite/ that are imported as gramlite.export and so on
LAYERS = (  # from below; what stands on one line may not import each other, but for the first, where files are
    ("errors", "storage", "terminal", "console", "interrupt", "forks"),
    ("formats",),
    ("runtime",),
    ("generation",),
    ("backends",),
    ("judging",),
    ("ranking", "rows", "reference"),
    ("loading",),
    ("options", "integrations"),
    ("export", "quant", "bench"),
    ("commands",),
    ("cli",),
    ("", "__main__"),
)
FREE = (("export", "quant"), ("quant", "export"), ("bench", "export"), ("bench", "quant"))
MOST_LINES = 400
MOST_SKIPS = 120  # lines that `ruff format` is told to leave alone; to be lowered, never raised

# What is still wrong: to be emptied, never added to. An entry that does not hold any more may go at any time.
KNOWN_IMPORTS: set[str] = set()
KNOWN_CIRCLES: set[str] = set()
KNOWN_CLASSES: set[str] = set()
KNOWN_SILENT: set[str] = set()
KNOWN_LONG: set[str] = {
    "tests/bench/test_suites.py",
    "tests/bench/test_sweep.py",
    "tests/broken_gguf.py",
    "tests/reference/test_reference.py",
}


def module_name(path: Path) -> str:
    """The dotted name a file is imported by; a package's own is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("gramlite", *parts) if parts[0] in MAPPED else parts).removesuffix(".__init__")


FILES = sorted(
    path
    for folder in ("gramlite", *MAPPED)
    for path in (ROOT / folder).rglob("*.py")
    if "claims" not in path.parts  # scripts that are not packaged
)
MODULES = {module_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
IMPORTS: dict[str, set[str]] = {}


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """The modules of the product that a module imports, at its top or inside a function."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


for _name, _tree in TREES.items():
    IMPORTS[_name] = {each for each in imported(_name, _tree) if each in MODULES and each != _name}


def folder_of(name: str) -> str:
    """The folder right below gramlite, or the file's name where it lies in none."""
    return name.removeprefix("gramlite").lstrip(".").partition(".")[0]


def layer_of(name: str) -> int:
    found = [number for number, folders in enumerate(LAYERS) if folder_of(name) in folders]
    assert found, f"{name} has no layer: name its folder in LAYERS"
    return found[0]


def may_import(name: str, other: str) -> bool:
    """Whether the first module lies above the second, or both in one folder."""
    mine, its = folder_of(name), folder_of(other)
    if mine == its or other == "gramlite":  # whose own file has the version and names what is below
        return True
    ground = layer_of(name) == layer_of(other) == 0
    return layer_of(name) > layer_of(other) or ground or (mine, its) in FREE


def test_imports_lead_downward() -> None:
    upward = {
        f"{name} -> {other}" for name, others in IMPORTS.items() for other in others if not may_import(name, other)
    }
    assert upward <= KNOWN_IMPORTS


def test_gramlite_never_imports_export_quant_or_bench() -> None:
    """But by name, in the table of commands: what is installed as gramlite alone must judge."""
    found = {
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        for other in others
        if folder_of(other) in MAPPED and folder_of(name) not in MAPPED
    }
    assert found <= KNOWN_IMPORTS


def reachable(name: str) -> set[str]:
    """Every module that is imported by a module, or by what that imports."""
    found: set[str] = set()
    ahead = [name]
    while ahead:
        new = IMPORTS[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_no_import_circles() -> None:
    assert {name for name in MODULES if name in reachable(name)} <= KNOWN_CIRCLES


def test_a_class_name_means_one_class() -> None:
    places: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    doubled = {name: found for name, found in places.items() if len(found) > 1}
    assert {name: found for name, found in doubled.items() if name not in KNOWN_CLASSES} == {}


def test_a_file_name_is_there_once_in_a_folder() -> None:
    """Also not as a file and a folder, nor in two cases, which some file systems take for one."""
    for folder in {path.parent for path in FILES}:
        names = sorted(path.stem.casefold() for path in folder.iterdir() if path.suffix == ".py" or path.is_dir())
        assert [name for name, same in groupby(names) if len(list(same)) > 1] == [], folder


def test_files_are_short() -> None:
    paths = [*FILES, *(ROOT / "tests").rglob("*.py")]
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: size for path, size in sizes.items() if size > MOST_LINES and path not in KNOWN_LONG} == {}


def test_a_folder_says_what_lives_there_and_what_it_may_import() -> None:
    said = {name: ast.get_docstring(TREES[name]) or "" for name, path in MODULES.items() if path.name == "__init__.py"}
    part = re.compile(r"\b(may import|is below it|imports?)\b")
    silent = {name for name, text in said.items() if len(text) < 40 or (name.count(".") == 1 and not part.search(text))}
    assert silent <= KNOWN_SILENT


def test_the_formatter_is_not_switched_off() -> None:
    # spelled in two parts, so that this file does not count
    off, skip = "fmt: " + "off", "fmt: " + "skip"
    texts = {path: path.read_text(encoding="utf-8") for path in [*FILES, *(ROOT / "tests").rglob("*.py")]}
    assert [path for path, text in texts.items() if off in text] == []
    assert sum(text.count(skip) for text in texts.values()) <= MOST_SKIPS
