"""Labels: which response of a pair is known to be better, as benchmarks write it."""

from __future__ import annotations

from ..pair import Winner


def label_from(value: object) -> Winner | None:
    """A label as benchmarks write it; anything unknown counts as unlabelled."""
    if isinstance(value, str):
        text = value.strip().upper().removeprefix("RESPONSE_").removeprefix("MODEL_")
        known: dict[str, Winner] = {
            "A": "A",
            "B": "B",
            "TIE": "tie",
            "A>B": "A",
            "B>A": "B",
            "A=B": "tie",
            "1": "A",
            "2": "B",
        }
        return known.get(text)
    if isinstance(value, int) and not isinstance(value, bool):
        numbers: dict[int, Winner] = {1: "A", 2: "B"}
        return numbers.get(value)
    return None
