"""Records of what `check` saw in an exported file, and of what `export` wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shapecheck.contract import Contract, Geometry, Mismatch

Basis = Literal["given", "inside", "preset", "none"]
"""The origin of the contract: the caller, the file, the preset that fits best, or the file's own table alone."""
Weights = Literal["link", "copy", "none"]
"""The weights stay in the checkpoint, are copied to a file of their own, or are left out."""


@dataclass(frozen=True, slots=True)
class DeclaredInput:
    """A base input as the file declares it."""

    name: str
    shape: str
    dtype: str


@dataclass(frozen=True, slots=True)
class DeclaredSlot:
    """A residual as the graph has it, with the shape that the file declares."""

    name: str
    shape: str
    skip: str
    """The shape it is added to as measured, (batch, channels, height, width), or `not seen`; empty if that is nothing."""
    producer: str
    """The module that makes the skip, if the file's names tell it."""
    slot: str
    """The contract's slot that it stands for; empty for none."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """An exported file, the contract it was compared with, and everything that is wrong with it."""

    path: str
    exporter: str
    contract: Contract
    basis: Basis
    naming: str
    """Key of the naming scheme of the slots; empty if they were found by graph walk."""
    inputs: tuple[DeclaredInput, ...]
    slots: tuple[DeclaredSlot, ...]
    divisor: int
    """The graph works at multiples of this; 0 if it worked at no size that was tried."""
    fixed: tuple[tuple[str, int], ...]
    """Sizes of a call that the file declares as numbers: of batch, h, w, tokens."""
    geometry: Geometry | None
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    """Inputs of the contract that the file has: the contract's name, and the file's."""
    unchecked: str
    """The reason why the sizes were not checked; empty if they were."""
    makes_residuals: bool = False
    """It holds its ControlNet, and takes no residuals."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file that was written."""

    path: Path
    contract: Contract
    weights: Weights
    reason: str
    """The reason why the weights were copied although nobody requested it; else empty."""
    files: tuple[Path, ...]
    """Every file that the model needs: the ONNX file, then those of its weights."""
    dtype: str
    opset: int
    naming: str
    fp8: int = 0
    """The number of layers in fp8."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One output at one size: an ONNX file's numbers beside PyTorch's."""

    output: str
    geometry: Geometry
    difference: float
    """The largest difference from PyTorch in float32, as a share of the largest value there."""
    allowed: float

    @property
    def agrees(self) -> bool:
        """Return whether the difference is allowed; if PyTorch's own error is infinite or not a number, none is."""
        return math.isfinite(self.allowed) and self.difference <= self.allowed
