"""The result of explaining a text: candidate faults, each with the slot where it shows; certain causes; or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shapecheck.contract import Contract, Geometry
from shapecheck.explain.residual_table import Fault
from shapecheck.explain.simulate import Failure
from shapecheck.explain.symptom import Symptom

CauseKind = Literal[
    "dtype", "container", "mid", "missing", "unknown", "range", "input", "odd size", "from_unet", "dimensions", "nets", "value",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fault that leads to the text, on this UNet, at these sizes."""

    failure: Failure
    """At the first of the geometries."""
    faults: tuple[Fault, ...]
    """The fault, and others that lead to the very same residuals."""
    geometries: tuple[Geometry, ...]

    @property
    def fault(self) -> Fault:
        return self.faults[0]


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause that a text leaves no choice about."""

    kind: CauseKind
    where: str
    """The slot or input; empty if the text names none."""
    message: str
    change: str
    command: str = ""
    """The command that makes it certain."""
    slots: tuple[str, ...] = ()
    """The slots it concerns, by our names."""


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The candidates on one architecture, which all of `models` have; `geometry` is requested, else the usual one."""

    models: tuple[str, ...]
    contract: Contract
    geometry: Geometry
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class TextReading:
    """One symptom and its explanations."""

    symptom: Symptom
    answers: tuple[ModelAnswer, ...] = ()
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The readings of a text on the models that were tried; `reason` says why there is none about residuals."""

    readings: tuple[TextReading, ...]
    tried: tuple[str, ...]
    reason: str = ""

    @property
    def explanations(self) -> tuple[TextReading, ...]:
        """The readings that explain something."""
        return tuple(reading for reading in self.readings if reading.answers or reading.causes)
