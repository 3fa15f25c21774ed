"""How measured numbers are written: one place, so that text and page say the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal


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


Style = Literal["difference", "times", "share", "strength", "cosine", "decibel", "count", "seconds", "milliseconds", "level"]
"""`difference`: an error; `times`: a ratio; `share`: of a whole; `level`: of 255 from black to white; the others say it."""


_NAMES = {math.inf: "∞", -math.inf: "−∞"}


def written(value: float, style: Style) -> str:
    """The number for a person: `2.3e-05`, `1.40×`, `0.01%`, `0.998`, `96.2 dB`; NaN and ∞ by name.

    >>> written(0.00012, "share"), written(1.0, "share"), written(0.0, "share")
    ('0.012%', '100%', '0%')
    """
    if not math.isfinite(value):
        return _NAMES.get(value, "NaN")
    return _FORMS[style](value)


def _share(value: float) -> str:
    """Never 0% where it is more than nothing, never 100% where it is less than all."""
    percent = 100 * value
    if percent in (0, 100):
        return f"{percent:.0f}%"
    if abs(percent) < 10:
        return f"{percent:#.2g}%"
    return f"{min(percent, 99.9) if percent < 100 else percent:.1f}%"


_FORMS: dict[Style, Callable[[float], str]] = {
    "difference": lambda value: f"{value:.2e}",
    "times": lambda value: f"{value:.2f}×" if abs(value) < 1000 else f"{value:.1e}×",
    "share": _share,
    "strength": lambda value: f"{value:.3f}",
    "cosine": lambda value: f"{value:.6f}",
    "decibel": lambda value: f"{value:.1f} dB",
    "count": lambda value: f"{value:.0f}",
    "seconds": lambda value: f"{value:.2f} s",
    "milliseconds": lambda value: f"{value:.1f} ms",
    "level": lambda value: f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}",
}
