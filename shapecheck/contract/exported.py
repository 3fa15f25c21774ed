"""What an export wrote, and how its numbers compare with PyTorch's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.geometry import Geometry

Weights = Literal["link", "copy", "none"]
"""Whether the weights stay in the checkpoint, lie in a file of their own, or are not there at all."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file that was written."""

    path: Path
    contract: Contract
    weights: Weights
    reason: str
    """Why the weights were copied although nobody asked for that; else empty."""
    files: tuple[Path, ...]
    """Every file the model needs: the ONNX file, then those its weights lie in."""
    dtype: str
    opset: int
    naming: str


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
        """Whether the difference is allowed; where PyTorch's own error is infinite or not a number, nothing is."""
        return math.isfinite(self.allowed) and self.difference <= self.allowed
