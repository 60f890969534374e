"""A backend without a model, for tests and for trying a pipeline: its verdicts are a hash of the prompt.

Its artifact is a JSON file `{"format": "scripted", "seconds": 0.01, "rationale": "...", "metadata": {...}}`, where the
metadata are a backend's; without a chat template in them `--chat-template` has to be given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gramlite.errors import ModelError, OutOfMemory
from gramlite.formats.artifact import Artifact
from gramlite.formats.model_folder import is_text, read_json_object
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Ended, Request, Written
from gramlite.runtime.options import RuntimeOptions

from .local import Door, LocalBackend
from .protocol import Capabilities

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


@dataclass
class Playing:
    """A request that was started: what it will come to, and how many of its tokens are written."""

    request: Request
    generation: Generation | None = None
    written: int = 0

    @property
    def cells(self) -> int:
        return len(self.request.prompt) + self.written


class ScriptedBackend(LocalBackend):
    """Writes the scripted rationale, then prefers A or B by a hash of the prompt and the adapter.

    It keeps to all that the Backend protocol says, so that schedules can be tested: `sequences` run at a time, in so many
    `cells`, `tokens` a step; what began last makes room and starts again. Memory runs out at the steps `full_at`, which
    are counted from 1, and can be stepped down from `places` times.
    """

    vocabulary = ByteVocabulary()
    context = 1 << 20
    device = "cpu"

    def __init__(
        self,
        script: Mapping[str, Any],
        *,
        sequences: int = 16,
        cells: int = 1 << 24,
        tokens: int = 1 << 20,
        full_at: Container[int] = (),
        places: int = 0,
        adapters: bool = False,
    ) -> None:
        super().__init__()
        self.metadata: dict[str, Any] = {"quantization": None, "chat_template": None, "template": None}
        self.metadata |= script.get("metadata", {})
        self._rationale = script.get("rationale", "Feedback:\nfine\n\nConclusion:\nscripted\n</think>").encode()
        self._seconds = script.get("seconds", 0.0)
        self._sequences, self._cells, self._tokens, self._takes_adapters = sequences, cells, tokens, adapters
        self._full_at, self._places, self._steps = full_at, places, 0
        self.context = min(self.context, cells)
        self._door = Door()
        self._set: tuple[str | None, bool] = None, False  # the adapter in force, and whether the one that runs is alone
        self._playing: list[Playing] = []
        self._again: list[Playing] = []  # what had to make room for others and starts again

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            sequences=self._sequences, cells=self._cells, context=self.context, adapters=self._takes_adapters
        )

    @property
    def _running(self) -> int:
        return len(self._playing) + len(self._again)

    def start(self, request: Request) -> bool:
        """See Backend.start."""
        self._require_fit(request)
        asked = request.adapter, request.alone
        if self._running and (
            self._again
            or asked != self._set
            or request.alone
            or len(self._playing) >= self._sequences
            or self._used + len(request.prompt) > self._cells
            or self._door.is_held_against(request.key)
        ):
            return self._door.refuse(request.key)
        self._set = asked
        self._playing.append(Playing(request))
        return self._door.enter(request.key)

    def cancel(self, key: Hashable) -> None:
        """See Backend.cancel."""
        self._door.forget(key)
        self._playing = [one for one in self._playing if one.request.key != key]
        self._again = [one for one in self._again if one.request.key != key]

    def open_adapter(self, path: str | None) -> None:
        """See Backend.open_adapter; any path will do."""

    @property
    def _used(self) -> int:
        return sum(one.cells for one in self._playing)

    def _advance(self) -> None:
        self._steps += 1
        if self._steps in self._full_at:
            raise OutOfMemory(f"step {self._steps} was one too many")
        while self._again and (not self._playing or self._used + self._again[-1].cells <= self._cells):
            self._playing.append(self._again.pop())
        while len(self._playing) > 1 and self._used + self._tokens * len(self._playing) > self._cells:
            self._again.append(Playing(self._playing.pop().request))
        for one in list(self._playing):
            self._write(one)

    def _write(self, one: Playing) -> None:
        """Let a request go on by as many tokens as a step has."""
        request, begun = one.request, one.written
        if one.generation is None:
            self._aborted.wait(self._seconds)
            self._require_going()
            one.generation = self._run(request)
        one.written = min(begun + self._tokens, one.generation.generated)
        text = (one.generation.thinking or "")[begun : one.written]
        if text and request.streams:
            self._events.append(Written(request.key, begun, text))
        if one.written == one.generation.generated:
            self._playing.remove(one)
            self._events.append(Ended(request.key, one.generation))

    def _run(self, request: Request) -> Generation:
        """What a request comes to."""
        asked = np.asarray(request.prompt, dtype=np.uint32).tobytes() + (request.adapter or "").encode()
        logits = np.zeros(self.vocabulary.size, dtype=np.float32)
        logits[ord("A")] = int.from_bytes(hashlib.sha256(asked).digest()[:2], "big") / 8192 - 4
        decoder = self._decoder(replace(request, streams=False))
        while not decoder.finished:
            position = decoder.generated
            step = logits.copy()
            step[self._rationale[position] if position < len(self._rationale) else END] += 100
            decoder.advance(step if not decoder.answering else logits)
        return decoder.result()

    def _forget(self) -> None:
        self._playing.clear()
        self._again.clear()

    def step_down(self) -> bool:
        """See Backend.step_down."""
        self._places -= 1
        return self._places >= 0

    def close(self) -> None:
        """There is nothing to free."""


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
