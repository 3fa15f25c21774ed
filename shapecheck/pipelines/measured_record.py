"""What was measured of the backends of one pipeline, kept as JSON in the folder of its files: numbers and names."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shapecheck.contract import ShapecheckError
from shapecheck.contract.json_codec import TextFormat, decode_record, encode, refuse_unprintable
from shapecheck.files import atomic_write, read_text

_LARGEST = 2**20
_FORMAT = TextFormat(
    "shapecheck_measured", "a record of measured backends", "shapecheck.accelerate", "it is measured again", _LARGEST
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One backend: the median of its frames, whether they are right, or why it was not timed."""

    backend: str
    milliseconds: float | None = None
    """Of a frame: all ControlNets and the UNet. None if it was not timed."""
    verdict: str = ""
    """The outcome of its parity check, in words; empty if it was not checked."""
    right: bool = False
    seconds: float = 0.0
    """Spent to prepare it: exported, built or compiled, and checked."""
    refusal: str = ""
    waiting: bool = False
    """It was not begun for want of time, and is measured once its files are there."""

    def describe(self, torch_milliseconds: float | None) -> str:
        """Return a line of a table."""
        if self.milliseconds is None:
            return f"{self.backend:<14} {self.refusal or self.verdict}"
        gain = f"{torch_milliseconds / self.milliseconds:5.2f}x" if torch_milliseconds else ""
        prepared = f"; {self.seconds:.0f} s to prepare" if self.seconds else ""
        return f"{self.backend:<14} {self.milliseconds:8.2f} ms {gain}  {self.verdict}{prepared}"


@dataclass(frozen=True, slots=True)
class MeasuredRecord:
    """All that was measured at one size on one machine. `budget` is the seconds it was given, None for as long as it took."""

    key: tuple[tuple[str, str], ...]
    """All that the numbers depend on: models, GPU, size, options, versions."""
    budget: float | None
    measurements: tuple[Measurement, ...]

    @property
    def winner(self) -> str:
        return choose_fastest(self.measurements)

    def to_json(self) -> str:
        return json.dumps({_FORMAT.key: _FORMAT.schema, **encode(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MeasuredRecord:
        """Read `to_json`'s text. Raises ShapecheckError on anything that `accelerate` does not write."""
        record = _FORMAT.parse(text)
        try:
            refuse_unprintable(record)
            read: MeasuredRecord = decode_record(cls, record)
            names = [measurement.backend for measurement in read.measurements]
            if len(set(names)) != len(names):
                raise ValueError("measurements: a backend is there twice")
            for measurement in read.measurements:
                times = (measurement.seconds, measurement.milliseconds or 0.0)
                if not all(0 <= value < math.inf for value in times) or measurement.milliseconds == 0:
                    raise ValueError(f"measurements: {measurement.backend} took no time that can be")
        except (ValueError, RecursionError) as error:
            raise ShapecheckError(f"a damaged record of measured backends: {error!s:.200}") from None
        return read

    def __str__(self) -> str:
        return "\n".join(describe_measurements(self.measurements))


def choose_fastest(measurements: Sequence[Measurement]) -> str:
    """Return the backend whose frames are right and shortest; PyTorch where none is shorter than its own."""
    timed = {
        measurement.backend: measurement.milliseconds
        for measurement in measurements
        if measurement.milliseconds is not None and (measurement.right or measurement.backend == "torch")
    }
    fastest, least = "torch", timed.get("torch", math.inf)
    for backend, milliseconds in timed.items():
        if milliseconds < least:
            fastest, least = backend, milliseconds
    return fastest


def describe_measurements(measurements: Sequence[Measurement]) -> list[str]:
    """Return a line for each backend, as in a table."""
    torch_milliseconds = next((one.milliseconds for one in measurements if one.backend == "torch"), None)
    return [measurement.describe(torch_milliseconds) for measurement in measurements]


def describe_choice(measured: Sequence[Measurement]) -> str:
    """Return in one line what was chosen, with the figures."""
    times = {measurement.backend: measurement.milliseconds for measurement in measured if measurement.milliseconds is not None}
    winner, eager = choose_fastest(measured), times.get("torch", math.nan)
    if winner != "torch":
        return f"{winner} is the fastest that is right: a frame takes {times[winner]:.2f} ms, {eager:.2f} in PyTorch"
    slower = "".join(f", {value:.2f} in {backend}" for backend, value in times.items() if backend != "torch")
    figures = f", where a frame takes {eager:.2f} ms{slower}" if "torch" in times else ""
    return f"nothing faster runs here: the UNet stays in PyTorch{figures}"


def select_waiting(record: MeasuredRecord, budget: float | None, is_made: Callable[[str], bool]) -> tuple[str, ...]:
    """Return what to measure at a later start: what was not begun, if its files have come or the budget is larger now."""
    waiting = [measurement.backend for measurement in record.measurements if measurement.waiting]
    if record.budget is not None and (budget is None or budget > record.budget):
        return tuple(waiting)
    return tuple(backend for backend in waiting if is_made(backend))


def locate_record(folder: Path, key: Mapping[str, str]) -> Path:
    """Return the file of what was measured under this key."""
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder / f"measured-{digest[:16]}.json"


def read_record(folder: Path, key: Mapping[str, str]) -> MeasuredRecord | None:
    """Return what was measured under this key before; None if nothing was, or the file is damaged or of something else."""
    path = locate_record(folder, key)
    if not path.is_file():
        return None
    try:
        text = read_text(path, _LARGEST, too_large=f"{path} is too large", not_text=f"{path} is not text")
        record = MeasuredRecord.from_json(text)
    except (ShapecheckError, OSError) as error:
        _log.warning("%s cannot be read, so the backends are measured again: %s", path, error)
        return None
    return record if dict(record.key) == dict(key) else None


def write_record(folder: Path, record: MeasuredRecord) -> Path:
    """Write it where `read_record` finds it. It appears whole."""
    path = locate_record(folder, dict(record.key))
    with atomic_write(path) as partial:
        partial.write_text(record.to_json(), encoding="utf-8")
    return path
