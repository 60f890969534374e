"""LoRA adapters over one open GGUF model: each is loaded once, and judges with different ones take turns.

The beginning that all prompts share is computed once for every adapter. While another one judges it lies in main
memory. It is not left in the KV cache: where other cells lie before a prompt's own, attention adds up in other
groups, and the same pair's margin came out up to 0.35 nats away. Copied back it lies where it lay before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gramlite.errors import OutOfMemory, ResourceError
from gramlite.formats.gguf_header import Header, check_adapter_fits, read_header

from .context import LlamaContext, Saved

PARKED = 4  # adapters whose beginning of the prompt stays computed while another one judges

Tokens = tuple[int, ...]


class Adapters:
    """The adapters of one model; `active` is in force, None where none is.

    `room` says how many bytes an adapter that is opened later may take. A path that is loaded stays what it was when
    it was loaded.
    """

    def __init__(self, context: LlamaContext, header: Header, room: Callable[[], int]) -> None:
        self.active: str | None = None
        self._context = context
        self._header = header
        self._room = room
        self._opened: dict[str, Any] = {}
        self._parked: dict[str | None, tuple[Tokens, Saved]] = {}

    def load(self, path: str | None) -> None:
        """Open an adapter that the memory was already planned for, and put it in force."""
        if path:
            self._opened[path] = self._context.open_adapter(path)
        self._apply(path)

    def switch(self, path: str | None, *, sequence: int, root: Tokens) -> Tokens:
        """Put another adapter in force, and return the tokens that `sequence` then holds.

        `root` is what it holds now; every other sequence is forgotten. Raises ModelError for an adapter that does not
        fit the model, ResourceError when memory does not hold it; then nothing has changed.
        """
        if path and path not in self._opened:
            self._open(path)
        before = self.active
        self._apply(path)
        self._park(before, sequence, root)
        self._context.clear()
        tokens, saved = self._parked.pop(path, ((), None))
        if saved is None or not self._context.restore(sequence, saved):
            self._context.clear()
            return ()
        self._parked[path] = tokens, saved  # used last
        return tokens

    def _open(self, path: str) -> None:
        header = read_header(Path(path), expect="adapter")
        check_adapter_fits(header, self._header)
        needed, free = sum(tensor.bytes for tensor in header.tensors), self._room()
        if needed > free:
            raise ResourceError(f"The adapter {path} needs {needed:,} bytes and {free:,} are free. Free some memory.")
        try:
            self._opened[path] = self._context.open_adapter(path)
        except OutOfMemory as error:
            raise ResourceError(
                f"The adapter {path} does not fit the GPU: {error}. Free some of its memory."
            ) from error

    def _apply(self, path: str | None) -> None:
        self._context.set_adapters([self._opened[path]] if path else [])
        self.active = path

    def _park(self, path: str | None, sequence: int, root: Tokens) -> None:
        """Keep a copy of what the sequence holds, unless the same is kept already."""
        if not root or self._parked.get(path, ((), None))[0] == root:
            return
        self._context.cut(sequence, len(root))
        saved = self._context.save(sequence)
        if saved is None:
            return
        self._parked.pop(path, None)
        self._parked[path] = root, saved
        while len(self._parked) > PARKED:
            del self._parked[next(iter(self._parked))]
