"""What an engine came to when it was checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shapecheck.contract.engine import Engine
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.profiles import Range
from shapecheck.contract.records import Mismatch

Read = Literal["engine", "record"]
"""Whether TensorRT showed the engine's own inputs and profiles, or only the record beside it told them."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a size fits."""

    geometry: Geometry
    profile: int | None
    """The number of the profile that serves it."""
    reasons: tuple[str, ...]
    """Why none does."""
    nearest: Geometry | None
    """The nearest size that one serves."""
    rebuilt: Range | None
    """The range to build for that the size would fit in."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Whether an engine was built from given weights."""

    name: str
    same: bool
    told: str


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """An engine, how it was read, and everything that is wrong with it or does not fit."""

    path: str
    engine: Engine
    read: Read
    unread: str
    """Why the engine itself was not read; empty where it was, or where its file is another's."""
    mismatches: tuple[Mismatch, ...]
    fit: Fit | None
    controlnets: tuple[str, ...]
    misfits: tuple[Mismatch, ...]
    weights: Weights | None

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong and all that was asked about fits."""
        fits = self.fit is None or self.fit.profile is not None
        return fits and not self.mismatches and not self.misfits and (self.weights is None or self.weights.same)
