"""Fixtures: the shared benchmark data, and the real reference judge, built once a session."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("repeatable")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of benchmark pairs and gold verdicts beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no benchmark data at {SHARED}")
    return SHARED


def keep_to_own_cores() -> None:
    """Give each of the workers that test side by side cores of its own, which what it starts keeps to."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and count > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: count]
        if cores:
            os.sched_setaffinity(0, cores)


keep_to_own_cores()  # not in a hook: a folder's conftest, read before any, may load torch, which counts cores only once


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let reports tell which fault a test is about (see compare_versions.py)."""
    for mark in item.iter_markers("fault"):
        item.user_properties.append(("fault", mark.args[0]))


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        for index, line in enumerate(file):
            if limit is not None and index >= limit:
                return
            yield json.loads(line)


@pytest.fixture(scope="session")
def gold(shared: Path) -> dict[str, dict[str, Any]]:
    """The float32 verdicts of the reference judge, by pair id."""
    return {row["id"]: row for row in read_jsonl(shared / "reference-judge/direct_fp32.jsonl.gz")}


@pytest.fixture(scope="session")
def reference_q8() -> Path:
    """The reference judge as it is used by default, in the cache."""
    from gramlite.reference.files import cached_gguf

    return cached_gguf()


@pytest.fixture(scope="session")
def reference_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gramlite.reference.files import build_gguf

    return build_gguf(tmp_path_factory.mktemp("reference") / "reference.F16.gguf", dtype="f16")


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    """An artifact that needs no model: its verdicts are a hash of the prompt."""
    path = tmp_path / "scripted.json"
    chat = (Path(__file__).parents[1] / "gramlite/data/reference/hf/chat_template.jinja").read_text()
    metadata = {"chat_template": chat, "template": {"name": "gramlite"}}
    path.write_text(json.dumps({"format": "scripted", "name": "scripted", "metadata": metadata}))
    return path
