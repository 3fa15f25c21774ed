"""Templates of pages that need nothing but themselves: no script, no font, no image from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from shapecheck.report.numbers import Style, format_number

_NONFINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True, slots=True)
class Place:
    """A value of the JSON and its path there, so that no number on a page is from elsewhere."""

    value: Any
    path: str = ""

    def __getitem__(self, step: str | int) -> Place:
        # Below nothing there is nothing.
        return Place(None if self.value is None else self.value[step], f"{self.path}.{step}".removeprefix("."))

    def format(self, style: Style) -> str:
        return format_number(_NONFINITE.get(self.value, self.value), style)


@cache
def open_template(name: str) -> Template:
    """Return a template of this package."""
    environment = Environment(
        loader=PackageLoader("shapecheck", ""),
        autoescape=True,
        finalize=_escape_unprintable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The filter `tojson` escapes whatever could end the script element that it stands in, and all that is not ASCII.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template(name)


def _escape_unprintable(value: object) -> object:
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(letter if letter.isprintable() or letter in "\n\t\xa0" else ascii(letter)[1:-1] for letter in value)
