"""How often Python opens a file, and how often an ONNX model is parsed. What ONNX Runtime reads itself, in C++, is not seen."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

_counters: list[Counter[str]] = []
"""Those that count now: an audit hook stays for the life of the process."""


def _hear(event: str, args: tuple) -> None:
    if _counters and event == "open" and isinstance(args[0], (str, os.PathLike)):
        for counter in _counters:
            counter[Path(args[0]).name] += 1


sys.addaudithook(_hear)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the files that are opened for as long as this lasts, by their names; and under "parsed" the models."""
    counter: Counter[str] = Counter()
    parse = onnx.load_model_from_string

    def parse_and_count(*args, **options):
        counter["parsed"] += 1
        return parse(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "load_model_from_string", parse_and_count)
        _counters.append(counter)
        try:
            yield counter
        finally:
            _counters.remove(counter)
