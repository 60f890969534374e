"""What transformers calls the KV cache: `cache` in the forwards of release 5.24 and newer, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def with_cache(module: Any, cache: Any) -> dict[str, Any]:
    """A KV cache, or None, as the keyword argument that a module's forward takes."""
    kind: Any = type(module)
    return {_keyword(kind): cache}


@functools.cache  # it is asked for with every token
def _keyword(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
