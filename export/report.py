"""What an export shows when it is done: the artifact, how small it is, and what to type next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from gramlite.console import show_facts
from gramlite.formats.artifact import Manifest, artifact_bytes
from gramlite.terminal import note, say_json

from .smoke import figures_only, summary


def source_bytes(manifest: Manifest) -> int | None:
    """The size of the weights that an artifact goes back to, over what was made in between; None where unknown."""
    source: dict[str, Any] = manifest.source
    while isinstance(source.get("source"), dict) and source["source"]:
        source = source["source"]
    known = source.get("bytes")
    return known if isinstance(known, int) and known > 0 else None


def compression(path: Path, manifest: Manifest) -> float | None:
    """How many times smaller an artifact is than the weights it goes back to; None where those are not known."""
    before, after = source_bytes(manifest), artifact_bytes(path)
    return before / after if before and after else None


def print_artifact(path: Path, manifest: Manifest, *, command: str, as_json: bool) -> None:
    """Print what was written to stdout: a table on a terminal, else one JSON object."""
    size = artifact_bytes(path)
    template = manifest.template or {}
    smaller = compression(path, manifest)
    if as_json or not sys.stdout.isatty():
        row = {
            "path": str(path),
            "format": manifest.format,
            "quantization": manifest.quantization,
            "bytes": size,
            "bits_per_weight": manifest.bits_per_weight,
            "source_bytes": source_bytes(manifest),
            "compression": None if smaller is None else round(smaller, 3),
            "sha256": manifest.files.get(path.name),
            "template": {key: template.get(key) for key in ("name", "sha256")} if template else None,
            "notes": manifest.settings.get("notes", []),
            "smoke": figures_only(manifest.smoke),
            "command": command,
        }
        say_json(row)
        return
    facts = [("file", str(path)), ("size", f"{size / 1e6:,.1f} MB")]
    if manifest.bits_per_weight is not None:
        facts.append(("bits per weight", f"{manifest.bits_per_weight:.2f} ({manifest.quantization})"))
    if smaller is not None:
        before = source_bytes(manifest) or 0
        facts.append(("compression", f"{smaller:.2f} times smaller than its source ({before:,} bytes)"))
    facts.append(("template", str(template.get("name", "none recorded"))))
    if manifest.smoke:
        facts.append(("first pairs", summary(manifest.smoke)))
    show_facts([*facts, ("next", command)])


def print_notes(manifest: Manifest) -> None:
    for said in manifest.settings.get("notes", []):
        note(f"note: {said}")


def judge_command(path: Path, manifest: Manifest, *, adapter: bool = False) -> str:
    """What to type to judge with an artifact."""
    words = ["gramlite", "judge", "PAIRS.jsonl"]
    words += ["-m", "BASE.gguf", "--adapter", str(path)] if adapter else ["-m", str(path)]
    if not manifest.template:
        words += ["--template", "FILE"]
    return shlex.join(words)
