"""Silence for libraries that log or draw progress bars of their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
