"""How a user's request can end badly, and text from outside in its message. Anything else that is raised is a bug of ours."""

from __future__ import annotations


class ShapecheckError(Exception):
    """The request could not be carried out: bad input, a missing file, a model that does not run.

    The message says what was looked for, where, what was found and what to do.
    """

    exit_status = 2


def one_line(value: object, longest: int = 120) -> str:
    """Return text from outside, fit for one line of a terminal."""
    text = str(value)[: 2 * longest]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
