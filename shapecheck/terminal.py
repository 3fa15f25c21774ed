"""What the command line writes: results on stdout or to a file, progress on stderr where a person is watching."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Never

import click

from shapecheck.contract import ShapecheckError
from shapecheck.files import whole

if TYPE_CHECKING:
    from tqdm import tqdm


class Steps:
    """Tells what is being done, one line overwritten; a bar of bytes where it is known how many there are."""

    def __init__(self) -> None:
        self._step = ""
        self._bar: tqdm[Never] | None = None

    def __call__(self, step: str, done: int = 0, total: int = 0, /) -> None:
        """Begin a step, or go on with it."""
        if not sys.stderr.isatty():
            return
        if step != self._step:
            self.close()
            self._step, self._bar = step, _bar(step, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave an empty line."""
        if self._bar is not None:
            self._bar.close()
        self._step, self._bar = "", None


@contextmanager
def progress() -> Iterator[Steps]:
    """Progress for as long as the block runs."""
    steps = Steps()
    try:
        yield steps
    finally:
        steps.close()


def write(text: str, output: Path | None) -> None:
    """To stdout, or to a file that appears under its name only when it is whole."""
    if output is None:
        _say(text)
        return
    with whole(output) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def drop_stdout() -> None:
    """What stdout still holds could not be written: the interpreter must not try again when it ends, and fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no stdout, or one that is no file
        return


def _say(text: str) -> None:
    if sys.stdout is None:
        raise ShapecheckError("cannot write to standard output: it is closed; -o FILE writes to a file")
    try:
        click.echo(text, nl=False)
    except OSError as error:
        drop_stdout()
        raise ShapecheckError(f"cannot write to standard output: {error.strerror or error}") from None


def _bar(step: str, total: int) -> tqdm[Never]:
    from tqdm import tqdm

    if total:
        return tqdm(desc=step, total=total, unit="B", unit_scale=True, leave=False, file=sys.stderr)
    return tqdm(desc=f"{step} …", bar_format="{desc}", leave=False, file=sys.stderr)
