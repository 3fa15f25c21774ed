"""Output of the command line: results on stdout or to a file, progress on stderr if a person is watching."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Never

import click

from shapecheck.contract import ShapecheckError
from shapecheck.files import atomic_write

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressLine:
    """The current step in one line that is overwritten, with a bar if the number of bytes is known.

    If nobody is watching, a line is written to the log `log_every` so many seconds, with those since the work began.
    """

    def __init__(self, log_every: float = math.inf) -> None:
        self._step = ""
        self._bar: tqdm[Never] | None = None
        self._log, self._over = sys.stderr, threading.Event()
        if math.isfinite(log_every) and self._log is not None and not _is_watched():
            threading.Thread(target=self._write_log, args=(log_every,), daemon=True).start()

    def _write_log(self, every: float) -> None:
        began, written = time.monotonic(), ""
        while not self._over.wait(every):
            if (step := self._step) not in ("", written):  # empty once the work is over
                written = step
                with suppress(OSError, ValueError):  # a log that is full, or closed
                    self._log.write(f"{time.monotonic() - began:.0f} s: {written}\n")
                    self._log.flush()

    def __call__(self, step: str, done: int = 0, total: int = 0, /) -> None:
        if not _is_watched():
            self._step = step
            return
        if step != self._step:
            self.close()
            from tqdm import tqdm

            form = {"total": total, "unit": "B", "unit_scale": True} if total else {"bar_format": "{desc} …"}
            self._step, self._bar = step, tqdm(desc=step, leave=False, file=sys.stderr, **form)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def end(self) -> None:
        """Leave an empty line, and write nothing more."""
        self._over.set()
        self.close()

    def close(self) -> None:
        """Leave an empty line."""
        if self._bar is not None:
            self._bar.close()
        self._step, self._bar = "", None


def _is_watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # there is none if it is closed


@contextmanager
def progress(*, log_every: float = math.inf) -> Iterator[ProgressLine]:
    """Show progress while the block runs; where nobody is watching, every so many seconds."""
    line = ProgressLine(log_every)
    try:
        yield line
    finally:
        line.end()


def write(text: str, output: Path | None) -> None:
    """Write to stdout, or to a file that appears under its name only when it is whole."""
    if output is not None:
        with atomic_write(output) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    if sys.stdout is None:
        raise ShapecheckError("cannot write to standard output: it is closed; -o FILE writes to a file")
    try:
        click.echo(text, nl=False)
    except OSError as error:
        drop_stdout()
        raise ShapecheckError(f"cannot write to standard output: {error.strerror or error}") from None


def drop_stdout() -> None:
    """Discard what stdout still holds and cannot be written, or the interpreter would try again at its end, and fail."""
    with suppress(AttributeError, OSError, ValueError):  # no stdout, or one that is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
