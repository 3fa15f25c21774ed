"""Numbers and text as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any


def named(value: Any) -> Any:
    """The same, with lists for tuples and names for the numbers that JSON does not have: "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, dict):
        return {key: named(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [named(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def storable(text: str) -> str:
    """The same JSON where half a surrogate pair, which is no UTF-8, is written as JSON's escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
