"""Artifacts of a sweep that need no model: scripted judges, one that fails, one that crashes, one that takes long."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

from gramlite.bench.builder import Target
from gramlite.bench.variants import SweepSource, Variant

from gramlite.errors import ModelError
from gramlite.formats.artifact import Manifest, hash_files, write_manifest

CHAT = Path(__file__).resolve().parents[2] / "gramlite/data/reference/hf/chat_template.jinja"
FAILS, CRASHES = "Q2_K", "Q3_K_M"


def artifact_target(variant: Variant, source: SweepSource, folder: Path) -> Target:
    """A scripted artifact in place of the real one; `seconds` files in the checkpoint say how slow it is."""
    slow = source.checkpoint / "seconds"
    seconds = float(slow.read_text()) if slow.is_file() else 0.0
    recipe = {"kind": variant.kind, "checkpoint": source.checkpoint_sha256}
    build = partial(build_scripted, name=variant.name, kind=variant.kind, seconds=seconds)
    return Target(folder / f"{variant.file_name}.gguf", recipe, build)


def build_scripted(path: Path, *, name: str, kind: str, seconds: float) -> None:
    time.sleep(seconds)
    if kind == FAILS:
        raise ModelError("the rows of every matrix are too short")
    if kind == CRASHES:
        os.abort()
    (path.parent / ".half-written.0a1b2c3d.tmp").write_text("a torso")
    metadata = {"chat_template": CHAT.read_text(), "template": {"name": "gramlite"}}
    script = {"format": "scripted", "name": name, "metadata": metadata, "seconds": seconds / 20}
    path.write_text(json.dumps(script) + " " * 100 * len(name))
    bits = {"F16": 16.0, "Q8_0": 8.5}.get(kind, 4.5)
    write_manifest(
        path, Manifest(format="scripted", name=name, quantization=kind, bits_per_weight=bits, files=hash_files(path))
    )
