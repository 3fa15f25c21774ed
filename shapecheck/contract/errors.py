"""Errors that a user's request can end with, and text from outside in their messages. Any other exception is a bug of ours."""

from __future__ import annotations


class ShapecheckError(Exception):
    """The request failed: bad input, a missing file, a model that does not run. The message says what, where and what to do."""

    exit_status = 2


def one_line(value: object, longest: int = 120) -> str:
    """Return text from outside, fit for one line of a terminal."""
    text = str(value)[: 2 * longest]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def first_line(error: Exception, longest: int = 300) -> str:
    """Return the first line of an error's message, or its class if it has none, fit for one line of a terminal."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0], longest)
