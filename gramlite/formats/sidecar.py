"""What was measured of an artifact on its user's own data, stored beside it in `<artifact>.calibration.json`.

It lies beside a folder artifact too, not in it, so that the artifact's own hash does not change.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gramlite.errors import InputError, ModelError, ResourceError
from gramlite.storage import write_json


def sidecar_path(artifact: Path) -> Path:
    """The file beside an artifact, under the name that its folder has where it is given as `.` or `..`."""
    if artifact.name in ("", ".."):
        artifact = Path(os.path.abspath(artifact))  # not resolve(): a link's sidecar lies beside the link
    if not artifact.name:
        raise InputError(f"Nothing can be stored beside {artifact}. Give a model that lies in a folder.")
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
    lists = list(value.values()) if isinstance(value, dict) else [None]
    if not all(isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) for entries in lists):
        raise ModelError(f"{path} is no calibration. Delete it, and run gramlite calibrate again.")
    stored: dict[str, Any] = value
    return stored


def require_writable(artifact: Path) -> None:
    """Raise unless an entry can be stored beside an artifact: ResourceError, or ModelError for a file that is broken."""
    read_sidecar(artifact)
    path = sidecar_path(artifact)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write_sidecar(
    artifact: Path, kind: str, entry: Mapping[str, Any], replaces: Callable[[Mapping[str, Any]], bool]
) -> Path:
    """Store an entry in the list `kind` beside an artifact, in place of those that it replaces."""
    stored = read_sidecar(artifact)
    stored[kind] = [*(old for old in stored.get(kind, []) if not replaces(old)), dict(entry)]
    path = sidecar_path(artifact)
    try:
        write_json(path, stored)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{path} cannot be written ({error.strerror}). Put the model, or a link to it, into a folder that can be "
        "written to, and give its path there."
    )


def belongs(entry: Mapping[str, Any], model: Mapping[str, Any], settings: str) -> bool:
    """Whether an entry was measured of a judge: its `model` object and the digits of its settings.

    The weights of a Hugging Face checkpoint may be quantized while they are loaded, so the sha256 of its folder does
    not say what they became. An entry from before that was recorded still stands for the formats that are run as
    they lie on disk.
    """
    if (entry.get("model"), entry.get("settings")) != (model.get("sha256"), settings):
        return False
    if entry.get("companion"):
        raise ModelError(
            "What is stored was measured with a companion, and those are no longer run. Run gramlite calibrate again."
        )
    if entry.get("adapter") != model.get("adapter"):
        return False
    known = entry.get("quantization")
    return bool(known == model.get("quantization") or (known is None and model.get("format") != "hf"))


def replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether an entry takes an older one's place: of the same judge, or what is recorded of it does not differ."""
    if any(old.get(key) != new.get(key) for key in ("model", "adapter", "settings")):
        return False
    return old.get("quantization") in (None, new.get("quantization"))
