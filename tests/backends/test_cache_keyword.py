"""The KV cache's name in transformers' forwards, of old and of new releases."""

from __future__ import annotations

from typing import Any

from gramlite.backends.cache_keyword import with_cache


class Before:
    def forward(self, states: Any, past_key_values: Any = None, **others: Any) -> Any:
        return states


class After:
    def forward(self, states: Any, cache: Any = None, **others: Any) -> Any:
        return states


def test_each_release_gets_the_name_it_knows() -> None:
    assert with_cache(Before(), 3) == {"past_key_values": 3}
    assert with_cache(After(), None) == {"cache": None}
