"""Benchmarks, one file each, found by name; `open_suite("rmbench:FILE")` gives the module and the file.

A suite module has `SOURCE` (where to get its file and what that must look like), `FILES` (the names it goes
by), `load(path, *, limit=None)`, an iterator of labelled pairs, and `score(rows, pairs)`, the official
score. Nothing is bundled and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from gramlite.errors import InputError
from gramlite.pair import Pair


class Suite(Protocol):
    SOURCE: str
    FILES: tuple[str, ...]

    def load(self, path: Path, *, limit: int | None = None) -> Iterator[Pair]: ...

    def score(self, rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]: ...


def suite_names() -> list[str]:
    """The suites there are: the modules of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_suite(specification: str) -> tuple[str, Suite, Path]:
    """The name, module and file of `SUITE` or `SUITE:FILE`; raises InputError where there is none."""
    from gramlite.bench.records import find_file

    name, _, file = specification.partition(":")
    if name.replace("-", "_") not in suite_names():
        raise InputError(f"There is no suite {name!r}. The suites are: {', '.join(suite_names())}.")
    module = cast(Suite, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
    return name, module, find_file(Path(file) if file else None, module.FILES, module.SOURCE)
