"""Progress of long work, and silence of the libraries that report their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A callback for the current step; `done` and `total` are bytes, and 0 if unknown."""

    def __call__(self, step: str, done: int = 0, total: int = 0, /) -> object: ...


def silent(_step: str, _done: int = 0, _total: int = 0, /) -> None:
    """Ignore progress."""


@contextmanager
def silence_logger(library: str) -> Iterator[None]:
    """Silence a library's log while the block runs."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def hide_progress_bars(*libraries: str) -> Iterator[None]:
    """Hide the progress bars of diffusers or transformers while the block runs."""
    loaded = [sys.modules[name] for library in libraries if (name := f"{library}.utils.logging") in sys.modules]
    shown = [module for module in loaded if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
