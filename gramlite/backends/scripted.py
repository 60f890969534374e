"""A backend without a model, for tests and for trying a pipeline: its verdicts are a hash of the prompt.

Its artifact is a JSON file `{"format": "scripted", "name": ..., "seconds": 0.01, "rationale": "..."}`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gramlite.errors import ModelError
from gramlite.formats.artifact import Artifact
from gramlite.formats.model_folder import is_text, read_json_object
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.runtime.options import RuntimeOptions

END = 256


@dataclass(frozen=True)
class ByteVocabulary:
    """One token a byte, and a few special tokens after them."""

    special_tokens: Mapping[str, int] = field(default_factory=lambda: {"<|im_start|>": 257, "<|im_end|>": END})
    end_tokens: frozenset[int] = frozenset({END})
    size: int = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""


class ScriptedBackend:
    """Writes the scripted rationale, then prefers A or B by a hash of the prompt."""

    vocabulary = ByteVocabulary()
    context = 1 << 20
    device = "cpu"

    def __init__(self, script: Mapping[str, Any]) -> None:
        self.metadata: dict[str, Any] = {"quantization": None, "chat_template": None, "template": None}
        self.metadata |= script.get("metadata", {})
        self._rationale = script.get("rationale", "Feedback:\nfine\n\nConclusion:\nscripted\n</think>").encode()
        self._stop = threading.Event()
        self._seconds = script.get("seconds", 0.0)

    def generate(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Generation]]:
        for request in requests:
            if request:
                yield request.key, self._run(request)

    def _run(self, request: Request) -> Generation:
        self._stop.wait(self._seconds)
        digest = hashlib.sha256(np.asarray(request.prompt, dtype=np.uint32).tobytes()).digest()
        logits = np.zeros(self.vocabulary.size, dtype=np.float32)
        logits[ord("A")] = int.from_bytes(digest[:2], "big") / 8192 - 4
        while not request.decoder.finished:
            position = request.decoder.generated
            step = logits.copy()
            step[self._rationale[position] if position < len(self._rationale) else END] += 100
            request.decoder.advance(step if not request.decoder.answering else logits)
        return request.decoder.result()

    def abort(self) -> None:
        self._stop.set()

    def close(self) -> None:
        pass


def open_artifact(artifact: Artifact, options: RuntimeOptions) -> ScriptedBackend:
    """Open a scripted artifact; the runtime options change nothing."""
    script = read_json_object(artifact.path, advice="Write it again.", finite=True)
    seconds = script.get("seconds", 0.0)
    if (
        not isinstance(script.get("metadata", {}), dict)
        or not is_text(script.get("rationale", ""))
        or not isinstance(seconds, int | float)
        or not 0 <= seconds <= 3600
    ):
        raise ModelError(f"{artifact.path} is no script: metadata, rationale or seconds are of another kind.")
    return ScriptedBackend(script)
