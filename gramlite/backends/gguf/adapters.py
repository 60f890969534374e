"""LoRA adapters over one open GGUF model: each is loaded once, and requests with different ones take turns.

The beginning that all prompts share is computed once for every adapter. While another one judges it lies in main
memory. It is not left in the KV cache: where other cells lie before a prompt's own, attention adds up in other
groups, and the same pair's margin came out up to 0.35 nats away. Copied back it lies where it lay before. What runs
alone has its turns in the same way, and all of its beginning is copied, so that its bits do not tell of others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gramlite.errors import OutOfMemory, ResourceError
from gramlite.formats.gguf_header import Header, check_adapter_fits, read_header

from .cells import TRUNK, Lane, Trunk
from .context import LlamaContext, Saved

PARKED = 4  # lanes whose beginning of the prompt stays computed while another one runs


class Adapters:
    """The adapters of one model; `lane` is what runs now, with its adapter in force.

    `room` says how many bytes an adapter that is opened later may take. A path that is loaded stays what it was when
    it was loaded.
    """

    def __init__(self, context: LlamaContext, header: Header, room: Callable[[], int]) -> None:
        self.lane = Lane()
        self._context = context
        self._header = header
        self._room = room
        self._opened: dict[str, Any] = {}
        self._parked: dict[Lane, tuple[Trunk, Saved]] = {}

    def load(self, path: str | None) -> None:
        """Open an adapter that the memory was already planned for, and put it in force."""
        if path:
            self._opened[path] = self._context.open_adapter(path)
        self._apply(Lane(path))

    def switch(self, lane: Lane, trunk: Trunk) -> Trunk:
        """Let another lane run, and return the trunk that it has then.

        `trunk` is what there is now; every other sequence is forgotten. Raises ModelError for an adapter that does not
        fit the model, ResourceError when memory does not hold it; then nothing has changed.
        """
        self.open(lane.adapter)
        before = self.lane
        self._apply(lane)
        self._park(before, trunk if before.alone else Trunk(trunk.tokens[: trunk.root], trunk.root))
        self._context.clear()
        found, saved = self._parked.pop(lane, (Trunk(), None))
        if saved is None or not self._context.restore(TRUNK, saved):
            self._context.clear()
            return Trunk()
        self._parked[lane] = found, saved  # used last
        return found

    def open(self, path: str | None) -> None:
        """Load an adapter, unless it is; raises as `switch`."""
        if path and path not in self._opened:
            self._open(path)

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

    def _apply(self, lane: Lane) -> None:
        if lane.adapter != self.lane.adapter:
            self._context.set_adapters([self._opened[lane.adapter]] if lane.adapter else [])
        self.lane = lane

    def _park(self, lane: Lane, trunk: Trunk) -> None:
        """Keep a copy of what the trunk holds, unless the same is kept already."""
        if not trunk.tokens or self._parked.get(lane, (Trunk(), None))[0] == trunk:
            return
        self._context.cut(TRUNK, len(trunk.tokens))
        saved = self._context.save(TRUNK)
        if saved is None:
            return
        self._parked.pop(lane, None)
        self._parked[lane] = trunk, saved
        while len(self._parked) > PARKED:
            del self._parked[next(iter(self._parked))]
