"""Backends: each runs one artifact format, token ids in, finished generations out. They know nothing of judging."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from ..artifact import Artifact
from ..decoding import Decoder, Generation
from ..errors import InputError, ModelError
from ..forks import keep, threads_here
from ..vocabulary import Vocabulary

Device = Literal["auto", "cuda", "cpu"]
LoadIn = Literal["nf4", "int8"]


@dataclass(frozen=True)
class Request:
    """One generation to make: `prompt` (token ids, scaffold included) and the `decoder` to run on it.

    `splits` are lengths of the prompt's beginning, ascending, that other requests are likely to share; a backend may
    keep them computed. Up to `reuse` tokens (None: all) may be taken from what earlier requests left, so that a prompt
    is computed in the same pieces whatever came before it. `key` comes back with the generation.
    """

    key: int
    prompt: tuple[int, ...]
    decoder: Decoder
    splits: tuple[int, ...] = ()
    reuse: int | None = None


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How an artifact is opened.

    `context` is the most tokens a sequence may hold (None: the model's own, at most 8,192, less where memory is
    short); `parallel` the most sequences decoded together (None: one, and `load` has more where the settings think or
    vote); `adapter` a LoRA file; `deterministic` keeps to one sequence at a time so that the same input gives the same
    bits; `load_in` quantizes a full-precision checkpoint's linear layers while it is loaded.
    """

    device: Device = "auto"
    threads: int | None = None
    context: int | None = None
    parallel: int | None = None
    adapter: str | None = None
    deterministic: bool = False
    load_in: LoadIn | None = None


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
        module = importlib.import_module(f"{__name__}.{artifact.format}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(__name__):
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
