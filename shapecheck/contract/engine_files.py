"""The file beside an engine that says what it is."""

from __future__ import annotations

import stat
from pathlib import Path

from shapecheck.contract.engine import Engine
from shapecheck.contract.errors import ShapecheckError

SIDECAR = ".shapecheck.json"
"""What is added to an engine's file name for its record; whose key "contract" holds the contract."""
ENGINES = (".plan", ".engine", ".trt")
"""How the name of an engine ends."""
_LARGEST = 16 * 2**20
_LONGEST = 2000


def record_of(engine: Path) -> Path:
    """The file that holds an engine's record."""
    return engine.with_name(engine.name + SIDECAR)


def is_engine(path: Path) -> bool:
    """Whether a file's name is that of an engine."""
    return path.suffix.lower() in ENGINES


def read_engine(path: str | Path) -> Engine:
    """The record beside an engine: contract, profiles, and all that it was built from.

    Raises ShapecheckError, naming the file, where there is none, or it is damaged or was edited.
    """
    beside = record_of(Path(path))
    try:
        beside = beside if beside.exists() else record_of(Path(path).resolve())  # beside the file that a link stands for
        if not stat.S_ISREG(beside.stat().st_mode):
            raise ShapecheckError(f"{beside} is no regular file, as an engine's record is")
        with beside.open("rb") as file:
            text = file.read(_LARGEST + 1).decode("utf-8-sig")
    except FileNotFoundError:
        size_of_engine(Path(path))
        raise ShapecheckError(
            f"{path} has no {beside.name} beside it, where an engine's contract is kept; copy both together, or build it again"
        ) from None
    except OSError as error:
        raise ShapecheckError(f"cannot read {beside}: {error.strerror or error}") from None
    except UnicodeError:
        raise ShapecheckError(f"{beside} is not UTF-8 text, as an engine's record is; build the engine again") from None
    try:
        return Engine.from_json(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{beside}: {str(error)[:_LONGEST]}") from None


def size_of_engine(path: Path) -> int:
    """Bytes of an engine. Raises ShapecheckError where it is no regular file: nothing may wait for a pipe."""
    try:
        status = path.stat()
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ShapecheckError(f"{path} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}, not an engine")
    return status.st_size
