"""Numbers as text for a person and in JSON: in one place, so that text, page and JSON say the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from shapecheck.contract import Geometry

Style = Literal["difference", "times", "share", "strength", "cosine", "decibel", "count", "seconds", "milliseconds", "level"]
"""`difference`: an error; `times`: a ratio; `share`: of a whole; `level`: of 255 from black to white; the others say it."""


def format_number(value: float, style: Style) -> str:
    """Return the number for a person: `2.3e-05`, `1.40×`, `0.01%`, `0.998`, `96.2 dB`; NaN and ∞ by name.

    >>> format_number(0.00012, "share"), format_number(1.0, "share"), format_number(0.0, "share")
    ('0.012%', '100%', '0%')
    """
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    return _FORMS[style](value)


def _format_share(value: float) -> str:
    # Never 0% if it is more than nothing, never 100% if it is less than all.
    percent = 100 * value
    if percent in (0, 100):
        return f"{percent:.0f}%"
    if abs(percent) < 10:
        return f"{percent:#.2g}%"
    return f"{min(percent, 99.9) if percent < 100 else percent:.1f}%"


_FORMS: dict[Style, Callable[[float], str]] = {
    "difference": lambda value: f"{value:.2e}",
    "times": lambda value: f"{value:.2f}×" if abs(value) < 1000 else f"{value:.1e}×",
    "share": _format_share,
    "strength": lambda value: f"{value:.3f}",
    "cosine": lambda value: f"{value:.6f}",
    "decibel": lambda value: f"{value:.1f} dB",
    "count": lambda value: f"{value:.0f}",
    "seconds": lambda value: f"{value:.2f} s",
    "milliseconds": lambda value: f"{value:.1f} ms",
    "level": lambda value: f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}",
}


def format_count(count: int, noun: str) -> str:
    """Return `1 slot` or `13 slots`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def encode_nonfinite(value: Any) -> Any:
    """Return the value with lists for tuples, and "NaN", "Infinity", "-Infinity" for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: encode_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def dump_json(value: Any, *, ascii_only: bool = False) -> str:
    """Return JSON that any parser reads and UTF-8 can hold: half a surrogate pair is written as JSON's escape."""
    text = json.dumps(encode_nonfinite(value), indent=1, ensure_ascii=ascii_only, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def format_pixels(geometry: Geometry, vae_factor: int) -> str:
    """Return width × height."""
    return f"{geometry.width * vae_factor}×{geometry.height * vae_factor}"


def list_some(names: Sequence[str]) -> str:
    """Return the first two of names, and how many more there are."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
