"""Records of how long frames take on several backends, measured in one run: numbers, no tensors."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from shapecheck.contract.geometry import Geometry

TORCH_BACKENDS = {
    "torch": "PyTorch, eager",
    "torch-compile": "PyTorch, torch.compile",
    "torch-reduce-overhead": "PyTorch, torch.compile as a user types it: mode reduce-overhead, fullgraph, channels_last",
}
COMPILED = ("torch-compile", "torch-reduce-overhead")
BENCH_BACKENDS = (*TORCH_BACKENDS, "ort", "ort-cuda", "ort-trt", "trt")


@dataclass(frozen=True, slots=True)
class Frame:
    """Milliseconds of one frame. `handover` sums residuals, checks the call and returns outputs."""

    controlnet: float
    handover: float
    unet: float

    @property
    def total(self) -> float:
        return self.controlnet + self.handover + self.unet


@dataclass(frozen=True, slots=True)
class Timing:
    """One backend of a run, and in `ran` what really ran, with its precision. Without frames it did not, for a `reason`."""

    backend: str
    ran: str
    frames: tuple[Frame, ...] = ()
    memory: int | None = None
    """Bytes that loading it and its first frames added, to the process or on the GPU; None if unknown."""
    reason: str = ""
    asked: bool = True
    """Somebody named it, or the artefact is for it; else it is there for comparison."""
    controlnets: str = ""
    """Who runs the ControlNets of its frames; empty if there are none."""
    seconds: float | None = None
    """From loading or compiling it to the end of the frames that do not count."""

    @property
    def median(self) -> float:
        return statistics.median(frame.total for frame in self.frames)

    @property
    def p95(self) -> float:
        """Return the shortest frame, in milliseconds, that at least 95 of 100 do not exceed."""
        return sorted(frame.total for frame in self.frames)[math.ceil(0.95 * len(self.frames)) - 1]

    @property
    def rate(self) -> float:
        """Return frames a second, by the median."""
        return 1000 / self.median

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of all frames that each part, a field of `Frame`, takes: 0 to 1."""
        total = sum(frame.total for frame in self.frames)
        return {part: sum(getattr(frame, part) for frame in self.frames) / total for part in Frame.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class PicturePart:
    """A part of a picture that no frame has, for one picture: medians in milliseconds, None if it was not timed."""

    name: str
    """`VAE decode`, `VAE encode` or `text`."""
    ran: str
    """The models that were timed, and their precision."""
    eager: float | None = None
    compiled: float | None = None
    reason: str = ""
    """Why one of both was not timed."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Milliseconds of one picture. What was not timed is None and counts nothing."""

    frames: float
    decode: float | None
    text: float | None

    @property
    def total(self) -> float:
        return self.frames + (self.decode or 0) + (self.text or 0)

    @property
    def shares(self) -> dict[str, float]:
        """Return the share of the total that each part, a field, takes: 0 to 1."""
        return {part: (getattr(self, part) or 0) / self.total for part in Picture.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Bench:
    """A whole run: one UNet, one size, backends whose frames took turns. `contract` is the digest."""

    artefact: str
    contract: str
    geometry: Geometry
    controlnets: int
    device: str
    timings: tuple[Timing, ...]
    versions: tuple[tuple[str, str], ...]
    steps: int = 20
    parts: tuple[PicturePart, ...] = ()

    def compose_picture(self, timing: Timing, *, compiled: bool = False) -> Picture:
        """Return a picture of as many steps, decoded by the VAE in eager PyTorch or, if it was timed, `compiled`."""
        parts = {part.name: part for part in self.parts}
        decode, text = parts.get("VAE decode"), parts.get("text")
        fast = decode.compiled if decode and compiled else None
        slow = decode.eager if decode else None
        return Picture(self.steps * timing.median, slow if fast is None else fast, text.eager if text else None)

    @property
    def ran(self) -> bool:
        """Return whether every backend that somebody named ran, and any at all."""
        named = all(timing.frames for timing in self.timings if timing.asked)
        return named and any(timing.frames for timing in self.timings)
