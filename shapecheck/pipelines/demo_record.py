"""Records of what `shapecheck demo` measured: numbers and names, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DemoBackend = Literal["ort", "torch-compile", "ort-cuda", "ort-trt", "trt", "rtx"]
"""The backends of `doctor.environment.BACKENDS` that run what `accelerate` makes."""


@dataclass(frozen=True, slots=True)
class Change:
    """The distance between two pictures, in 255ths of the way from black to white."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in the demo's folder."""

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Demo:
    """A whole run: one picture in PyTorch, and the same one with another backend in the UNet's place.

    `size_px` is width and height, `backend` a key of `doctor.environment.BACKENDS`, `artefact` the name in the demo's folder of
    the ONNX file or engine that ran, empty if the UNet was compiled, `contract` a digest. With `random` weights the pictures
    are textures.
    """

    model: str
    controlnet: str
    random: bool
    prompt: str
    size_px: tuple[int, int]
    steps: int
    seed: int
    backend: str
    device: str
    precision: str
    artefact: str
    contract: str
    slots: int
    pictures: tuple[Picture, ...]
    difference: Change
    """Between PyTorch's picture and the backend's."""
    control: Change
    """Between PyTorch's pictures with the ControlNet and without."""
    allowed: float | None
    """The largest difference that passes; None in half precision, where rounding alone moves pictures."""
    torch_seconds: float
    """Median of one step, ControlNet included, without the first, which warms up."""
    backend_seconds: float
    versions: tuple[tuple[str, str], ...]

    @property
    def acted(self) -> bool:
        """Return whether the ControlNet changed more than may differ. If not, a backend without its slots would pass."""
        return math.isfinite(self.control.largest) and self.control.largest > (self.allowed or 0)

    @property
    def passes(self) -> bool:
        """Return whether both pictures are the same and the ControlNet acted; in half precision, whether it changed more."""
        if self.allowed is None:
            return math.isfinite(self.difference.largest) and self.difference.mean < self.control.mean and self.acted
        return self.difference.largest <= self.allowed and self.acted

    @property
    def verdict(self) -> str:
        """Return `PARITY`, `NOT JUDGED` or `BROKEN`."""
        if not self.passes:
            return "BROKEN"
        return "NOT JUDGED" if self.allowed is None else "PARITY"

    @property
    def times_faster(self) -> float:
        """Return how many steps the backend makes in the time of one of PyTorch's; NaN if no time was measured."""
        return self.torch_seconds / self.backend_seconds if self.backend_seconds > 0 else math.nan
