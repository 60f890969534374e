"""Backends: each runs one artifact format, requests in, events out, a step at a time. They know nothing of judging."""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gramlite.errors import InputError, ModelError
from gramlite.forks import keep, threads_here
from gramlite.formats.artifact import Artifact
from gramlite.generation.request import Event, Request
from gramlite.generation.vocabulary import Vocabulary
from gramlite.runtime.options import RuntimeOptions

PACKAGE = "gramlite.backends"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can do.

    `sequences` are decoded together at most, `cells` is how many tokens all of them may hold, `context` how many one may,
    prompt and generation together. `adapters` says whether requests may name LoRA adapters, `memory` how many bytes it
    is predicted to take, None where nobody knows.
    """

    sequences: int
    cells: int
    context: int
    adapters: bool = False
    memory: int | None = None


class Backend(Protocol):
    """An opened artifact.

    One thread starts requests and steps; `wake`, `abort` and the vocabulary may be used from any. A request that was
    started ends exactly once: with an event, when it is cancelled, or when a step raises.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokenizer, which stays the same when the model is loaded again elsewhere."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def device(self) -> str:
        """Where it runs, in words that begin with cpu or cuda: `cpu`, `cuda (28 of 28 layers)`."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the artifact says of itself: `quantization`, `chat_template`, `template` (name, sha256, text).

        `chat_template` is Jinja text, `template` may have a built-in name alone; where either is missing the user has to
        say it. `bos`, `eos` and `special` are what a chat template of its own may write.
        """
        ...

    def start(self, request: Request) -> bool:
        """Reserve what a request needs, and compute nothing; False where there is no room now.

        It is never False where nothing runs: there the request starts, or an error is raised that is its own. What was
        refused may be asked for again; others may start before it, but not without end. Making room for those that run,
        and starting them again, is the backend's own affair.
        """
        ...

    def step(self, wait: float) -> list[Event]:
        """Compute at most one micro-batch of what was started, or wait at most so many seconds for something to do.

        Raises OutOfMemory where memory runs out, GramliteError after an `abort`; then all that was started is dropped.
        """
        ...

    def wake(self) -> None:
        """End a wait; safe to call from another thread."""
        ...

    def cancel(self, key: Hashable) -> None:
        """Drop a request between two steps, one that waits for room too; an unknown one is no error."""
        ...

    def release(self, group: Hashable) -> None:
        """Say that no more of a group will come: what is kept computed for it alone may go."""
        ...

    def open_adapter(self, path: str | None) -> None:
        """Load a LoRA adapter that requests are to name; one that is loaded stays what it was.

        Raises InputError where requests may name none, ModelError for one that does not fit the model, ResourceError
        when memory does not hold it.
        """
        ...

    def abort(self) -> None:
        """Make the running or the next step stop soon; safe to call from another thread."""
        ...

    def step_down(self) -> bool:
        """After OutOfMemory: load the model where it takes less of that memory; False where there is no such place.

        What a sequence may hold stays the same. Raises ResourceError where nothing below is left.
        """
        ...

    def close(self) -> None: ...


def open_backend(artifact: Artifact, options: RuntimeOptions) -> Backend:
    """Open an artifact with the backend that is named after its format.

    Raises ModelError for a format that has no backend or whose packages are missing, InputError for options that it does
    not take, ResourceError when it does not fit.
    """
    unknown = ModelError(
        f"No backend runs the format {ascii(artifact.format):.80} of {artifact.path}. If it is a checkpoint, type: "
        f"gramlite export gguf {artifact.path} -o judge.gguf"
    )
    if not artifact.format.isidentifier() or not artifact.format.isascii():
        raise unknown
    try:
        module = importlib.import_module(f"{PACKAGE}.{artifact.format}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(PACKAGE):
            raise unknown from error
        raise ModelError(
            f"The {artifact.format} backend needs the package {error.name!r}. "
            f"Type: pip install 'gramlite[{artifact.format}]'"
        ) from error
    if not hasattr(module, "open_artifact"):
        raise unknown
    if options.load_in and not getattr(module, "LOADS_IN", ()):
        raise InputError(
            f"--load-in {options.load_in} quantizes a Hugging Face checkpoint while it is loaded; {artifact.path} is a "
            f"{artifact.format} artifact, which stays what it is. Drop --load-in."
        )
    if not getattr(module, "OWN_THREADS", False):
        options = replace(options, threads=threads_here(options.threads))
    backend: Backend = module.open_artifact(artifact, options)
    if options.adapter and not backend.capabilities.adapters:
        backend.close()
        raise InputError(f"The {artifact.format} backend takes no --adapter, and would judge without it. Drop it.")
    keep(backend, refuse=True)
    return backend
