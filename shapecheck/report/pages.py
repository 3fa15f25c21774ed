"""Pages that need nothing but themselves: no script, no font, no image from elsewhere."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment() -> Environment:
    """Where templates are found, and what is done to every value that they print: nothing from outside is markup."""
    return Environment(
        loader=PackageLoader("shapecheck", ""),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: object) -> object:
    """Text without letters that a page cannot show, and some that it must not hold."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(each if each.isprintable() or each in "\n\t\xa0" else ascii(each)[1:-1] for each in value)
