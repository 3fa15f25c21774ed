"""How long work reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback for the current step; `done` and `total` are bytes, and 0 if unknown."""

    def __call__(self, step: str, done: int = 0, total: int = 0, /) -> object: ...


def silent(_step: str, _done: int = 0, _total: int = 0, /) -> None:
    """Ignore progress."""
