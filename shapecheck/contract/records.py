"""The parts of a contract and its reports: plain frozen values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shapecheck.contract.dims import Dim, Rounding, Shape, constant, show
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.json_codec import OPTIONAL, POSITIVE
from shapecheck.contract.naming import is_feature

Spatial = Literal["full", "pooled"]
"""`full`: the residual is as large as the skip. `pooled`: it is 1×1 and broadcast over the skip."""
Role = Literal["unet", "controlnet"]
"""A UNet takes residuals, a ControlNet emits them."""
MismatchKind = Literal[
    "channels", "size", "rounding", "batch", "rank", "broadcast", "dtype", "missing", "surplus", "order", "unused", "input",
    "baked", "symbol", "sizes", "name", "range", "engine", "device", "values",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor the UNet takes besides the residuals."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    argument: str
    """The argument of diffusers' forward: `sample`, or `added_cond_kwargs.text_embeds`."""

    def shape_at(self, geometry: Geometry) -> Shape:
        return geometry.shape_of(self.shape)


@dataclass(frozen=True, slots=True)
class AddSite:
    """The code that was seen to add a residual. File and line move with the diffusers release: never compared."""

    owner: str
    """Path of the module whose forward adds, from the UNet; empty for the UNet itself."""
    function: str
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}"


@dataclass(frozen=True, slots=True)
class Slot:
    """One place where a residual is added to a skip."""

    name: str
    skip: tuple[Dim, ...]
    """Shape of the UNet tensor the residual is added to: (batch, channels, height, width)."""
    spatial: Spatial
    producer: str
    """Path of the module that produces the skip."""
    up_block: str
    """Path of the block that consumes the sum; empty if none was seen."""
    adds: tuple[AddSite, ...]

    @property
    def channels(self) -> int:
        return self.skip[1].at({})

    @property
    def stride(self) -> int:
        """Return the latent cells that a slot cell covers along each side."""
        return self.skip[-2].stride

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """Return the rounding of an odd height by each halving down to this slot, outermost first."""
        return self.skip[-2].halvings

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Return the shape of the residual, which is not the skip's if it is pooled."""
        return self.skip if self.spatial == "full" else (*self.skip[:2], constant(1), constant(1))

    def shape_at(self, geometry: Geometry) -> Shape:
        """Return (batch, channels, height, width) of the residual, height and width in slot cells."""
        return geometry.shape_of(self.shape)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One disagreement: where, what was observed, what was expected, and the likely cause in words."""

    kind: MismatchKind
    where: str
    observed: Shape | str
    expected: Shape | str
    geometry: Geometry | None = None
    unet_module: str = ""
    controlnet_module: str = ""
    cause: str = ""
    controlnet: str = ""
    """The ControlNet, if several were observed."""

    def __str__(self) -> str:
        emitter = "adapter" if is_feature(self.where) else "ControlNet"
        paths = {"UNet": self.unet_module, emitter: self.controlnet_module}
        modules = ", ".join(f"{side} {path}" for side, path in paths.items() if path)
        place = f"{self.where} ({modules})" if modules else self.where
        sides = f"got {format_observed(self.observed)}, expected {format_observed(self.expected)}"
        at = f" at {self.geometry}" if self.geometry else ""
        cause = f"; {self.cause}" if self.cause else ""
        return f"{place}: {self.kind}: {sides}{at}{cause}"


@dataclass(frozen=True, slots=True)
class ControlNetInfo:
    """One ControlNet that was observed beside the UNet."""

    source: str
    class_name: str
    base_channels: int = field(metadata=POSITIVE)
    cross_attention_dim: int | None = field(metadata=POSITIVE)
    pooled: bool


@dataclass(frozen=True, slots=True)
class Header:
    """The circumstances in which the contract was written. Never part of equality or of the digest."""

    source: str = ""
    vae_factor: int = field(default=8, metadata=POSITIVE)
    """Pixels per latent cell along each side."""
    native: tuple[int, int] | None = field(default=None, metadata=POSITIVE)
    """Latent height and width of the model's own `sample_size`."""
    parameters: int | None = None
    controlnets: tuple[ControlNetInfo, ...] = ()
    adapter: str = field(default="", metadata=OPTIONAL)
    """The T2I-Adapter that was observed beside the UNet, if any."""
    handover: tuple[str, ...] = ()
    """Changes of the residuals between the ControlNet and the UNet, in words."""
    notes: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()

    @property
    def usual(self) -> tuple[int, int]:
        """Return the latent height and width to use if no size is requested: the model's own, else 64×64."""
        return self.native or (64, 64)

    @property
    def usual_px(self) -> tuple[int, int]:
        """Return the width and height of `usual` in pixels."""
        rows, columns = self.usual
        return columns * self.vae_factor, rows * self.vae_factor


def format_observed(value: Shape | str) -> str:
    """Return a shape for a person to read; words in its place stay as they are."""
    return value if isinstance(value, str) else show(value)
