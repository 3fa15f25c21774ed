"""How long frames take on several backends, measured in one run: records of numbers, no tensors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from shapecheck.contract.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: the ControlNets, what carries their residuals to the UNet, and the UNet. Milliseconds."""

    controlnet: float
    handover: float
    """Summing residuals, checking the call, giving outputs back."""
    unet: float

    @property
    def total(self) -> float:
        """Of the whole frame."""
        return self.controlnet + self.handover + self.unet


@dataclass(frozen=True, slots=True)
class Timing:
    """One backend of a run; without frames it could not run, and `reason` says why."""

    backend: str
    ran: str
    """What really ran, and in which precision."""
    frames: tuple[Frame, ...] = ()
    memory: int | None = None
    """Bytes by which loading it and its first frames made the process larger, on a GPU what is taken there; None if unknown."""
    reason: str = ""
    asked: bool = True
    """Whether somebody named it; else it is there for comparison."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(self.frames))

    @property
    def median(self) -> float:
        """Milliseconds of half of all frames or fewer."""
        return statistics.median(each.total for each in self.frames)

    @property
    def p95(self) -> float:
        """Milliseconds that 95 of 100 frames do not exceed."""
        return percentile([each.total for each in self.frames], 0.95)

    @property
    def rate(self) -> float:
        """Frames a second, by the median."""
        return 1000 / self.median

    def share(self, part: str) -> float:
        """What a part, a field of `Frame`, takes of all frames together: 0 to 1."""
        return float(sum(getattr(each, part) for each in self.frames) / sum(each.total for each in self.frames))


@dataclass(frozen=True, slots=True)
class Bench:
    """A whole run: one UNet, one size, backends whose frames took turns."""

    artefact: str
    contract: str
    """Its digest."""
    geometry: Geometry
    controlnets: int
    device: str
    timings: tuple[Timing, ...]
    versions: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "timings", tuple(self.timings))

    @property
    def ran(self) -> bool:
        """Whether every backend that somebody named ran."""
        return all(each.frames or not each.asked for each in self.timings) and any(each.frames for each in self.timings)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least that share of them does not exceed.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5), percentile([3.0, 1.0, 2.0, 4.0], 0.95)
    (2.0, 4.0)
    """
    ordered = sorted(values)
    return next(value for at, value in enumerate(ordered, start=1) if at >= share * len(ordered))
