"""Fixtures of the backends' tests: tiny checkpoints of each family, and a decoder that only writes down logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gramlite.backends import Backend, Request
from gramlite.decoding import Generation

from ..export.conftest import checkpoint_of  # noqa: F401


@dataclass
class Probe:
    """A decoder that feeds `then`, one entry a step, and keeps the logits of every step."""

    then: list[Sequence[int]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    finished: bool = False
    most_tokens: int = 16

    def advance(self, logits: Any) -> Sequence[int]:
        self.seen.append(np.array(logits, dtype=np.float32))
        if self.then:
            return self.then.pop(0)
        self.finished = True
        return ()

    def result(self, *, cached: int = 0) -> Generation:
        return Generation(margin=0.0, thinking=None, forced=False, generated=0, cached=cached)


def logits_of(
    backend: Backend, prompt: Sequence[int], splits: tuple[int, ...] = (), then: Sequence[Sequence[int]] = ()
) -> tuple[list[Any], int]:
    """The logits after a prompt and after each further feed, and how many of its tokens were not computed again."""
    probe = Probe(list(then))
    request = Request(0, tuple(prompt), probe, splits)  # type: ignore[arg-type]
    _, generation = next(iter(backend.generate([request])))
    return probe.seen, generation.cached


@pytest.fixture(scope="session")
def reference_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference judge as a checkpoint's folder."""
    from gramlite.reference import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("backends") / "checkpoint")
