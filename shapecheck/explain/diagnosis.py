"""What a text comes to: candidate faults, each with the slot where it shows; causes that leave no choice; or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shapecheck.contract import Contract, Geometry, Shape
from shapecheck.explain.fault import Fault
from shapecheck.explain.residual_table import ResidualShapes
from shapecheck.explain.simulate import Stage
from shapecheck.explain.symptom import Symptom

CauseKind = Literal[
    "dtype", "container", "mid", "missing", "unknown", "range", "input", "odd size", "from_unet", "dimensions", "nets", "value",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fault that gives the text, on this UNet, at these sizes."""

    slot: str
    """Where it shows: the slot whose skip or residual fails to fit."""
    module: str
    stage: Stage
    wanted: Shape
    """What the UNet has there."""
    given: Shape
    """What it met."""
    faults: tuple[Fault, ...]
    """The fault, and others that lead to the very same residuals."""
    geometries: tuple[Geometry, ...]
    """Where it gives the text; the first is the one its shapes are told at."""

    @property
    def fault(self) -> Fault:
        """The one told first."""
        return self.faults[0]

    @property
    def table(self) -> ResidualShapes:
        """The residuals that give the text, at the first geometry."""
        return self.fault.given


@dataclass(frozen=True, slots=True)
class Cause:
    """What a text says without leaving a choice."""

    kind: CauseKind
    where: str
    """The slot or input; empty where the text names none."""
    told: str
    change: str
    command: str = ""
    """What makes it certain."""
    slots: tuple[str, ...] = ()
    """The slots it concerns, by our names."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The candidates on one architecture."""

    models: tuple[str, ...]
    """Presets or the model named: all of this architecture."""
    contract: Contract
    geometry: Geometry
    """What is asked for, else the model's usual size."""
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """One symptom and what it comes to."""

    symptom: Symptom
    answers: tuple[Answer, ...] = ()
    causes: tuple[Cause, ...] = ()

    @property
    def is_diagnosis(self) -> bool:
        """Whether it says anything of residuals."""
        return bool(self.answers or self.causes)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything a text comes to."""

    readings: tuple[Reading, ...]
    tried: tuple[str, ...]
    """The models that were tried."""
    reason: str = ""
    """Why this is no matter of residuals, where nothing was found."""

    @property
    def found(self) -> tuple[Reading, ...]:
        """The readings that say something."""
        return tuple(reading for reading in self.readings if reading.is_diagnosis)
