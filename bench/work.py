"""What is judged: the pairs of a suite, all of them or some, and how they were chosen."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramlite.errors import InputError
from gramlite.judging.pair import Pair
from gramlite.rows import identifier_text
from gramlite.storage import sha256_cached

from .suites import LabelMeanings, Suite, load_pairs, open_suite


@dataclass(frozen=True)
class SuiteWork:
    """A suite that is to be judged: its name, module, file and pairs, how these were chosen and labels explained."""

    name: str
    module: Suite
    path: Path
    pairs: Sequence[Pair]
    limit: int | None
    sample: int | None = None
    longest: int | None = None
    subset: str | None = None
    labels: LabelMeanings | None = None

    @property
    def title(self) -> str:
        """The suite as it is typed, without its file."""
        return f"{self.name}/{self.subset}" if self.subset else self.name

    def to_json(self) -> dict[str, Any]:
        """What run.json says of the suite; `pairs_sha256` covers the pairs that were judged."""
        return {
            "name": self.name,
            "path": str(self.path.resolve()),
            "sha256": None if self.path.is_dir() else sha256_cached(self.path),
            "subset": self.subset,
            "limit": self.limit,
            "sample": self.sample,
            "longest": self.longest,
            "labels": self.labels,
            "pairs": len(self.pairs),
            "pairs_sha256": hashlib.sha256("".join(map(pair_digest, self.pairs)).encode()).hexdigest(),
        }


def load_work(
    specification: str, limit: int | None = None, *, sample: int | None = None, longest: int | None = None,
    labels: LabelMeanings | None = None,
) -> SuiteWork:  # fmt: skip
    """The pairs of `SUITE[/SUBSET][:FILE]`: all, the first `limit`, or `sample` drawn by a hash of their ids.

    Only pairs of at most `longest` characters count; `labels` says what labels of one's own pairs mean. The larger of
    two samples holds the smaller. Raises InputError for a suite or subset without such pairs, or with an id that is
    there twice.
    """
    if limit and sample:
        raise InputError("--limit takes the first pairs and --sample draws some. Give one of them.")
    suite, colon, file = specification.partition(":")
    suite, slash, subset = suite.partition("/")
    name, module, path = open_suite(suite + colon + file)
    pairs = list(load_pairs(name, module, path, limit=None if subset or sample or longest else limit, labels=labels))
    if slash:
        pairs = of_subset(pairs, subset, specification)
    if longest:
        long = {item_of(pair) for pair in pairs if length_of(pair) > longest}
        pairs = [pair for pair in pairs if item_of(pair) not in long]
    if not pairs:
        short = f" of at most {longest:,} characters" if longest else ""
        raise InputError(f"{path} holds no pair{short} for the suite {name}. {module.SOURCE}")
    counts = Counter(identifier_text(pair.id) for pair in pairs)
    doubled = [identifier for identifier, count in counts.items() if count > 1]
    if doubled:
        raise InputError(f"{path} holds the id {doubled[0]!r} more than once. Make ids unique.")
    if subset or sample or longest:
        pairs = chosen_pairs(pairs, limit=limit, sample=sample)
    return SuiteWork(name, module, path, pairs, limit, sample, longest, subset or None, labels)


def item_of(pair: Pair) -> str:
    """What pairs that are scored together share, as the nine of an RM-Bench item do."""
    return str((pair.meta or {}).get("item") or identifier_text(pair.id))


def length_of(pair: Pair) -> int:
    """The characters of a pair."""
    return len(pair.prompt) + len(pair.response_a) + len(pair.response_b)


def of_subset(pairs: Sequence[Pair], subset: str, specification: str) -> list[Pair]:
    """The pairs of a subset, or of all whose names begin with its name and a hyphen; letter case does not matter."""
    wanted = subset.casefold()
    names = {str((pair.meta or {}).get("subset")) for pair in pairs}
    kept = {name for name in names if name.casefold() == wanted or name.casefold().startswith(f"{wanted}-")}
    if not kept:
        raise InputError(f"{specification} has no subset {subset!r}. It has: {', '.join(sorted(names))}.")
    return [pair for pair in pairs if (pair.meta or {}).get("subset") in kept]


def chosen_pairs(pairs: Sequence[Pair], *, limit: int | None, sample: int | None) -> list[Pair]:
    """The first `limit` pairs or a `sample` of them, in their order; of pairs that form one item, all or none."""
    items: dict[str, list[Pair]] = {}
    for pair in pairs:
        items.setdefault(item_of(pair), []).append(pair)
    order = sorted(items, key=lambda item: hashlib.sha256(item.encode()).digest()) if sample else list(items)
    room = sample or limit or len(pairs)
    kept: set[str] = set()
    for item in order:
        if kept and len(items[item]) > room:
            break
        room -= len(items[item])
        kept.add(item)
        if room <= 0:
            break
    return [pair for item, members in items.items() if item in kept for pair in members]


def pair_digest(pair: Pair) -> str:
    """16 hexadecimal digits of all that a pair's row depends on."""
    text = json.dumps([identifier_text(pair.id), pair.prompt, pair.response_a, pair.response_b, pair.label])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
