"""Backends: each runs one artifact format, token ids in, finished generations out. They know nothing of judging."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from gramlite.errors import InputError, ModelError
from gramlite.forks import keep, threads_here
from gramlite.formats.artifact import Artifact
from gramlite.generation.decoder import Generation
from gramlite.generation.request import Request
from gramlite.generation.vocabulary import Vocabulary
from gramlite.runtime.options import RuntimeOptions

PACKAGE = "gramlite.backends"


class Backend(Protocol):
    """An opened artifact. It is used by one thread at a time."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context(self) -> int:
        """The most tokens one sequence may hold, prompt and generation together."""
        ...

    @property
    def device(self) -> str:
        """Where it runs, in words: `cpu`, `cuda (28 of 28 layers)`."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the artifact says of itself: `quantization`, `chat_template`, `template` (name, sha256, text)."""
        ...

    def generate(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Generation]]:
        """Run requests, taken one by one as there is room, and yield (key, generation) as each one ends.

        A None among them says that the next one depends on a generation that is still running. A request whose
        decoder is cancelled, before it begins or while it runs, ends without costing more.
        """
        ...

    def abort(self) -> None:
        """Make a running `generate` stop soon; safe to call from another thread."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class TakesAdapters(Protocol):
    """A backend that changes its adapter while it is open."""

    def use_adapter(self, path: str | None) -> None:
        """Judge with a LoRA adapter, or with none, from the next request on; not while `generate` runs."""
        ...


@runtime_checkable
class HoldsPrompts(Protocol):
    """A backend that keeps whole prompts computed while more generations of them may be asked for."""

    def let_go(self, prompt: tuple[int, ...]) -> None:
        """Say that a prompt is not needed any more; one that is not held is no error."""
        ...


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
    keep(backend, refuse=True)
    return backend
