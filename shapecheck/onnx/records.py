"""Records of what `check` saw in an exported file, and of what `export` wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shapecheck.contract import Contract, Geometry, Mismatch
from shapecheck.contract.size_request import describe_sizes, round_up

Basis = Literal["given", "inside", "preset", "none"]
"""The origin of the contract: the caller, the file, the preset that fits best, or the file's own table alone."""
Weights = Literal["link", "copy", "none"]
"""The weights stay in the checkpoint, are copied to a file of their own, or are left out."""
FOLLOWED = ((2, 17, 33), (3, 65, 97), (2, 24, 40), (3, 19, 30))
"""Batch, and height and width in multiples of the divisor: odd and even, none square. At these an export is followed."""


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
class SizeLimits:
    """The sizes at which a graph works, as far as the file declares them or they were tried."""

    divisor: int
    """Height and width have to be multiples of this; 0 if it worked at no size that was tried."""
    fixed: Mapping[str, int]
    """Sizes of a call that the file declares as numbers, or that alone of many work: of batch, h, w, tokens."""
    batches: Mapping[int, bool]
    """Every batch that was tried, and whether it works; empty if it is fixed."""
    tokens: Mapping[int, bool]
    """Every number of text tokens that was tried, and whether it works; empty if it is fixed."""
    latents: tuple[tuple[int, int], ...]
    """Every height and width that was tried and works, in latent cells."""
    refused: Geometry | None
    """The first size at which it fails, and why."""
    reason: str

    def fit(self, geometry: Geometry) -> Geometry:
        """Return the size nearest to another that the graph takes."""
        chosen = {}
        for symbol, tried in (("batch", self.batches), ("tokens", self.tokens)):
            size, works = geometry.sizes[symbol], [size for size, is_fine in tried.items() if is_fine]
            if works and not all(tried.values()):
                chosen[symbol] = min(works, key=lambda known: abs(known - size))
        return round_up(geometry, self.divisor or 1).with_sizes({**chosen, **self.fixed})

    def describe(self, divisor: int, vae_factor: int) -> tuple[str, ...]:
        """Return in what it is narrower than the model, whose divisor is given: `batch 2`, `77 text tokens`."""
        limits = [describe_sizes({"batch": self.fixed["batch"]})] if "batch" in self.fixed else []
        limits += _describe_tried("batch", self.batches)
        sides = {symbol: size for symbol, size in self.fixed.items() if symbol in ("h", "w")}
        if sides:
            pixels = "×".join(str(sides[symbol] * vae_factor) for symbol in ("w", "h") if symbol in sides)
            limits.append(f"{describe_sizes(sides)} ({pixels} pixels)")
        if self.divisor > divisor and len(sides) < 2:
            axes = " and ".join(axis for symbol, axis in (("h", "heights"), ("w", "widths")) if symbol not in sides)
            limits.append(f"{axes} that are multiples of {self.divisor} cells ({self.divisor * vae_factor} pixels)")
        limits += [describe_sizes({"tokens": self.fixed["tokens"]})] if "tokens" in self.fixed else []
        return (*limits, *_describe_tried("text tokens", self.tokens))


def _describe_tried(axis: str, tried: Mapping[int, bool]) -> list[str]:
    works = ", ".join(str(size) for size, is_fine in tried.items() if is_fine)
    fails = ", ".join(str(size) for size, is_fine in tried.items() if not is_fine)
    return [f"{axis} {works or 'of no number'} (not {fails})"] if fails else []


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
    limits: SizeLimits
    requested: tuple[Geometry, ...]
    """The sizes that were requested, and tried; empty if none was."""
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    """Inputs of the contract that the file has: the contract's name, and the file's."""
    unchecked: str
    """The reason why the sizes were not checked; empty if they were."""
    makes_residuals: bool = False
    """It holds its ControlNet, and takes no residuals."""
    input_limits: tuple[str, ...] = ()
    """In what its inputs are narrower than the model's, sizes apart: `whole timesteps (int64)`."""
    other_form: str = ""
    """Why it is no UNet with slots, if it is of another form: its one mismatch."""

    @property
    def narrower(self) -> tuple[str, ...]:
        """Return in what it is narrower than its model, of sizes what was checked."""
        if self.unchecked or not self.limits.divisor:
            return self.input_limits
        return (*self.limits.describe(self.contract.divisor, self.contract.header.vae_factor), *self.input_limits)


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
