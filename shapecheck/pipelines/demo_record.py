"""What `shapecheck demo` is asked for and what it came to: records of numbers and names, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry

DemoBackend = Literal["ort", "ort-cuda", "ort-trt", "trt", "rtx"]
"""What takes the UNet's place: of `contract.environment.BACKENDS` those that run what `accelerate` makes."""


PROMPT = "a red chair by the window"


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """What to show, as a user says it. Raises ShapecheckError where that cannot be shown."""

    model: str | None = None
    """A diffusers folder or hub id; None for a small model with random weights."""
    controlnet: str | None = None
    """The same of a ControlNet; with a model, never alone."""
    image: Path | None = None
    """A control image; None for a depth map that is made."""
    prompt: str = PROMPT
    backend: DemoBackend = "ort"
    size_px: tuple[int, int] | None = None
    """Width and height; None for the model's own."""
    steps: int = 8
    seed: int = 0
    offline: bool = False
    variant: str | None = None

    def __post_init__(self) -> None:
        if (self.model is None) != (self.controlnet is None):
            given, absent = ("--model", "--controlnet") if self.controlnet is None else ("--controlnet", "--model")
            raise ShapecheckError(f"{given} without {absent}: give both, or neither for a small model with random weights")
        if self.variant is not None and self.model is None:
            raise ShapecheckError("--variant says which files of --model are read: give --model and --controlnet too")
        if self.size_px is not None:
            Geometry.from_px(*self.size_px)  # raises where pixels fill no whole latent cells
        _refuse_half_letters(self.prompt)


@dataclass(frozen=True, slots=True)
class Change:
    """How far one picture is from another, in 255ths of the way from black to white."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in the demo's folder."""

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Demo:
    """A whole run: one picture in PyTorch, and the same one with another backend in the UNet's place."""

    model: str
    controlnet: str
    random: bool
    """Whether the weights are random, so that pictures are textures."""
    prompt: str
    size_px: tuple[int, int]
    """Width and height."""
    steps: int
    seed: int
    backend: str
    """A key of `contract.environment.BACKENDS`."""
    device: str
    precision: str
    artefact: str
    """Name of the ONNX file or engine that ran, in the demo's folder."""
    contract: str
    """Its digest."""
    slots: int
    pictures: tuple[Picture, ...]
    difference: Change
    """Between PyTorch's picture and the backend's."""
    control: Change
    """Between PyTorch's picture and the one it gives without the ControlNet."""
    allowed: float | None
    """The largest difference that passes; None in half precision, where rounding alone moves pictures: nothing is judged."""
    torch_seconds: float
    """Of one step with the UNet in PyTorch, ControlNet included: the median over all steps but the first."""
    backend_seconds: float
    """The same with the backend in the UNet's place."""
    versions: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", tuple(self.pictures))
        object.__setattr__(self, "versions", tuple(self.versions))

    @property
    def acted(self) -> bool:
        """Whether the ControlNet changed more than may differ: else a backend without its slots would pass."""
        return math.isfinite(self.control.largest) and self.control.largest > (self.allowed or 0)

    @property
    def passes(self) -> bool:
        """Whether both pictures are the same and the ControlNet acted; in half precision, whether it did so more."""
        if self.allowed is None:
            return math.isfinite(self.difference.largest) and self.difference.mean < self.control.mean and self.acted
        return self.difference.largest <= self.allowed and self.acted

    @property
    def verdict(self) -> str:
        """`PARITY`, `NOT JUDGED` or `BROKEN`."""
        if not self.passes:
            return "BROKEN"
        return "NOT JUDGED" if self.allowed is None else "PARITY"

    @property
    def times_faster(self) -> float:
        """Steps of the backend in the time of one of PyTorch's; NaN where there is no time to tell."""
        return self.torch_seconds / self.backend_seconds if self.backend_seconds > 0 else math.nan


def _refuse_half_letters(prompt: str) -> None:
    """A command line may hold bytes that are no text, which no tokenizer takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ShapecheckError(f"the prompt is no text in UTF-8: {prompt!a:.80}") from None
