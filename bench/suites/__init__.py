"""Benchmarks, one file each, found by name; `open_suite("rmbench:FILE")` gives the module and the file.

A suite is one file here and nothing elsewhere. It has `SOURCE` (where to get its file and what that must look like), `FILES`
(the names it goes by), `load(path)`, an iterator of labelled pairs, and `score(rows, pairs)`, the official score. Where its
`load` takes `labels`, a user may say what labels mean; where it takes `limit`, it knows which pairs belong together.
Nothing is bundled and nothing is downloaded. Suites import `records`, `scoring` and each other, of this package.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

from gramlite.bench.records import find_file

from gramlite.errors import InputError
from gramlite.judging.pair import Pair, Winner

LabelMeanings = Mapping[str, Winner | None]


class Suite(Protocol):
    SOURCE: str
    FILES: tuple[str, ...]

    def load(self, path: Path) -> Iterator[Pair]: ...

    def score(self, rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]: ...


def suite_names() -> list[str]:
    """The suites there are: the modules of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def takes_labels(specification: str) -> bool:
    """Whether a suite has no encoding of labels, so that the user may say what those of its file mean."""
    return _takes(_module(specification.partition(":")[0].partition("/")[0]), "labels")


def _takes(module: Suite, option: str) -> bool:
    return option in inspect.signature(module.load).parameters


def load_pairs(
    name: str, module: Suite, path: Path, *, limit: int | None = None, labels: LabelMeanings | None = None
) -> Iterator[Pair]:
    """A suite's first pairs; `labels` says what their labels mean. Raises InputError for a suite that knows its own."""
    load: Callable[..., Iterator[Pair]] = module.load
    if labels is None:
        return load(path, limit=limit) if _takes(module, "limit") else islice(load(path), limit)
    if not _takes(module, "labels"):
        raise InputError(
            f"The suite {name} knows what its labels mean. Drop --labels, or read the file as your own pairs: pairs:{path}"
        )
    return islice(load(path, labels=labels), limit)


def open_suite(specification: str) -> tuple[str, Suite, Path]:
    """The name, module and file of `SUITE` or `SUITE:FILE`; raises InputError where there is none."""
    name, _, file = specification.partition(":")
    module = _module(name)
    return name, module, find_file(Path(file) if file else None, module.FILES, module.SOURCE)


def _module(name: str) -> Suite:
    if name.replace("-", "_") not in suite_names():
        raise InputError(f"There is no suite {name!r}. The suites are: {', '.join(suite_names())}.")
    return cast(Suite, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
