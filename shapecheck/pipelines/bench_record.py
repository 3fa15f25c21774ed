"""How long frames take on several backends, measured in one run: records of numbers, no tensors."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from shapecheck.contract.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Frame:
    """Milliseconds of one frame: the ControlNets, what carries their residuals to the UNet, and the UNet."""

    controlnet: float
    handover: float
    """Summing residuals, checking the call, returning outputs."""
    unet: float

    @property
    def total(self) -> float:
        """Return the milliseconds of the whole frame."""
        return self.controlnet + self.handover + self.unet


@dataclass(frozen=True, slots=True)
class Timing:
    """One backend of a run. Without frames it could not run, and `reason` says why."""

    backend: str
    ran: str
    """What really ran, and in which precision."""
    frames: tuple[Frame, ...] = ()
    memory: int | None = None
    """Bytes that loading it and its first frames added, to the process or on the GPU; None if unknown."""
    reason: str = ""
    asked: bool = True
    """Somebody named it, or the artefact is for it; else it is there for comparison."""

    @property
    def median(self) -> float:
        """Return the median in milliseconds."""
        return statistics.median(frame.total for frame in self.frames)

    @property
    def p95(self) -> float:
        """Return the shortest frame, in milliseconds, that at least 95 of 100 do not exceed."""
        return sorted(frame.total for frame in self.frames)[math.ceil(0.95 * len(self.frames)) - 1]

    @property
    def rate(self) -> float:
        """Return frames a second, by the median."""
        return 1000 / self.median

    def share(self, part: str) -> float:
        """Return what share of all frames a part, a field of `Frame`, takes: 0 to 1."""
        return float(sum(getattr(frame, part) for frame in self.frames) / sum(frame.total for frame in self.frames))


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

    @property
    def ran(self) -> bool:
        """Say whether every backend that somebody named ran, and any at all."""
        named = all(timing.frames for timing in self.timings if timing.asked)
        return named and any(timing.frames for timing in self.timings)
