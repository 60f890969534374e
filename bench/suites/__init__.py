"""Benchmarks, one file each, found by name; `open_suite("rmbench:FILE")` gives the module and the file.

A suite module has `SOURCE` (where to get its file and what that must look like), `FILES` (the names it goes
by), `load(path, *, limit=None)`, an iterator of labelled pairs, and `score(rows, pairs)`, the official
score. Nothing is bundled and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from gramlite.errors import InputError
from gramlite.judging.pair import Pair, Winner

Said = Mapping[str, Winner | None]


class Suite(Protocol):
    SOURCE: str
    FILES: tuple[str, ...]

    def load(self, path: Path, *, limit: int | None = None) -> Iterator[Pair]: ...

    def score(self, rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]: ...


def suite_names() -> list[str]:
    """The suites there are: the modules of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def takes_labels(specification: str) -> bool:
    """Whether a suite has no encoding of labels, so that the user may say what those of its file mean."""
    return "labels" in inspect.signature(_module(specification.partition(":")[0].partition("/")[0]).load).parameters


def load_pairs(
    name: str, module: Suite, path: Path, *, limit: int | None = None, labels: Said | None = None
) -> Iterator[Pair]:
    """A suite's pairs; `labels` says what their labels mean. Raises InputError for a suite that knows its own."""
    if labels is None:
        return module.load(path, limit=limit)
    if not takes_labels(name):
        raise InputError(
            f"The suite {name} knows what its labels mean. Drop --labels, or read the file as your own pairs: pairs:{path}"
        )
    return cast(Iterator[Pair], cast(Any, module).load(path, limit=limit, labels=labels))


def open_suite(specification: str) -> tuple[str, Suite, Path]:
    """The name, module and file of `SUITE` or `SUITE:FILE`; raises InputError where there is none."""
    from gramlite.bench.records import find_file

    name, _, file = specification.partition(":")
    module = _module(name)
    return name, module, find_file(Path(file) if file else None, module.FILES, module.SOURCE)


def _module(name: str) -> Suite:
    if name.replace("-", "_") not in suite_names():
        raise InputError(f"There is no suite {name!r}. The suites are: {', '.join(suite_names())}.")
    return cast(Suite, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
