"""Engines that are there already: found by all that an engine depends on, and never by a name alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shapecheck.build.external import file_digest
from shapecheck.contract import ShapecheckError
from shapecheck.contract.engine import Engine, Request
from shapecheck.contract.engine_files import read_engine, size_of_engine

_DIGITS = 16
_LONGEST_STEM = 100


def place(folder: Path, onnx: Path, request: Request) -> Path:
    """Where the cache keeps the engine of this request."""
    return folder / f"{onnx.stem[:_LONGEST_STEM]}-{request.key.removeprefix('sha256:')[:_DIGITS]}.plan"


def find(path: Path, request: Request, progress: Callable[[int, int], object] = lambda done, total: None) -> Engine | None:
    """The engine in this file, if it is the one that is asked for, unchanged since it was built; else None."""
    try:
        engine = read_engine(path)
        if engine.request.key != request.key or size_of_engine(path) != engine.size:
            return None
        return engine if file_digest(path, progress) == engine.digest else None
    except (ShapecheckError, OSError):  # no engine, no record, or one that cannot be read: build it
        return None
