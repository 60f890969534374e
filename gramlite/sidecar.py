"""What was measured of an artifact on its user's own data, stored beside it in `<artifact>.calibration.json`.

It lies beside a folder artifact too, not in it, so that the artifact's own hash does not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ModelError
from .storage import write_json


def sidecar_path(artifact: Path) -> Path:
    """The file beside an artifact."""
    return artifact.with_name(artifact.name + ".calibration.json")


def read_sidecar(artifact: Path) -> dict[str, Any]:
    """What is stored beside an artifact; empty where nothing is. Raises ModelError for a file that cannot be used."""
    path = sidecar_path(artifact)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Delete it, and run gramlite calibrate again.") from error
    if not isinstance(value, dict) or not all(isinstance(entry, list) for entry in value.values()):
        raise ModelError(f"{path} is no calibration. Delete it, and run gramlite calibrate again.")
    return value


def write_sidecar(
    artifact: Path, kind: str, entry: Mapping[str, Any], replaces: Callable[[Mapping[str, Any]], bool]
) -> Path:
    """Store an entry in the list `kind` beside an artifact, in place of those that it replaces."""
    stored = read_sidecar(artifact)
    stored[kind] = [*(old for old in stored.get(kind, []) if not replaces(old)), dict(entry)]
    write_json(sidecar_path(artifact), stored)
    return sidecar_path(artifact)
