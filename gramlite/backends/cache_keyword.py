"""What transformers calls the KV cache: `cache` in the forwards of release 5.24 and newer, `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any


def with_cache(module: Any, cache: Any) -> dict[str, Any]:
    """A KV cache, or None, as the keyword argument that a module's forward takes."""
    known = inspect.signature(module.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}
