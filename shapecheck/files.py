"""Bounded reading of files that anybody may have written; writing of files that appear only when they are whole."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from shapecheck.contract import ShapecheckError

_numbers = count()


@contextmanager
def report_unreadable(path: str | Path, advice: str = "") -> Iterator[None]:
    """Turn the system's refusal to read a path into a ShapecheckError; `advice` ends the message."""
    try:
        yield
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}{advice}") from None


def require_regular(path: Path, refusal: str) -> int:
    """Return the bytes of a regular file. Raises ShapecheckError with `refusal` for a folder or a pipe, which may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ShapecheckError(refusal)
    return status.st_size


def read_bytes(path: Path, limit: int, *, too_large: str) -> bytes:
    """Return what a file holds. Raises ShapecheckError with `too_large` beyond `limit` bytes; OSError as the system does."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ShapecheckError(too_large)
    return data


def read_text(path: Path, limit: int, *, too_large: str, not_text: str) -> str:
    """Return the UTF-8 text in a file as `read_bytes` does. Raises ShapecheckError with `not_text` for any other encoding."""
    try:
        return read_bytes(path, limit, too_large=too_large).decode("utf-8-sig")
    except UnicodeError:
        raise ShapecheckError(not_text) from None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep everybody else who asks out of a folder; nobody, if its lock cannot be opened or the system has none."""
    from filelock import FileLock

    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            # Other users lock the same file. It stays: removing it would give two processes the same lock.
            stack.enter_context(FileLock(folder / ".shapecheck.lock", mode=0o666))
        yield


@contextmanager
def atomic_write(output: Path) -> Iterator[Path]:
    """Yield a path to write to, beside `output`; rename it to that if the block ends well, remove it if it does not.

    A pipe or a device is written to directly. Raises ShapecheckError naming `output` if the system refuses.
    """
    target = output.resolve()
    if in_place := _is_device(target):
        partial = target
    else:
        partial = target.with_name(f".shapecheck.{os.getpid()}.{next(_numbers)}.partial")
        # A process that is killed leaves its file behind. One of three days is nobody's: no build takes that long to write on.
        for leftover in target.parent.glob(".shapecheck.*.partial"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 3 * 24 * 3600:
                    leftover.unlink(missing_ok=True)
    try:
        yield partial
        if not in_place:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
    except OSError as error:
        raise ShapecheckError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        if not in_place:
            partial.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Return the folder, made with those above it if needed. Raises ShapecheckError if the system refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShapecheckError(f"cannot write into {path}: {error.strerror or error}") from None
    return path


def ensure_writable(output: Path) -> None:
    """Raise ShapecheckError if a result could not be written, before the work is done for nothing."""
    try:
        target = output.resolve()
        if target.is_dir():
            raise ShapecheckError(f"cannot write {output}: it is a folder; name a file in it")
        written = target if _is_device(target) else target.parent
        written.stat()
    except (OSError, RuntimeError) as error:
        raise ShapecheckError(f"cannot write {output}: {getattr(error, 'strerror', None) or error}") from None
    if written == target.parent and not written.is_dir():
        raise ShapecheckError(f"cannot write {output}: {written} is not a folder")
    if not os.access(written, os.W_OK):
        raise ShapecheckError(f"cannot write {output}: no permission to write to {written}")


def _is_device(target: Path) -> bool:
    """Return whether this is a pipe or a device, which is written to and never replaced."""
    return target.exists() and not target.is_file()
