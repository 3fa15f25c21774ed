"""Residuals as shapes: those of a call, what a UNet needs, hints at what they were, and the fault that makes them wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shapecheck.contract import Contract, Geometry, Shape
from shapecheck.contract.naming import SHAPECHECK

Size = tuple[int, int]
"""Height and width in latent cells."""
_LARGEST_AXIS = 2**20
"""No axis of a real tensor is longer."""


@dataclass(frozen=True, slots=True)
class RequestedSize:
    """The size that a user says a text or a table is about. None leaves it open: then every size that fits is tried."""

    latent: Size | None = None
    batch: int | None = None

    def complete(self, contract: Contract) -> Geometry:
        """Return the geometry, with the model's own size for what is left open."""
        return Geometry(self.batch or 1, *(self.latent or contract.header.usual))


@dataclass(frozen=True, slots=True)
class ResidualShapes:
    """Shapes of the down residuals in order, and of the mid one, each (batch, channels, height, width)."""

    downs: tuple[Shape, ...]
    mid: Shape | None
    """None if no mid residual is passed: diffusers then takes the down residuals for T2I-Adapter features."""

    @classmethod
    def split(cls, flat: Sequence[Shape]) -> ResidualShapes:
        """Split all shapes in slot order, mid last."""
        return cls(tuple(flat[:-1]), flat[-1])

    @property
    def named(self) -> Mapping[str, Shape]:
        """The shapes by the name of the slot at which each arrives."""
        named = {SHAPECHECK.down(index): shape for index, shape in enumerate(self.downs)}
        return named if self.mid is None else named | {SHAPECHECK.mid: self.mid}


def right_shapes(contract: Contract, geometry: Geometry) -> ResidualShapes:
    """Return what the UNet of this contract needs at that geometry. Raises ShapecheckError if it refuses it."""
    return ResidualShapes.split(tuple(contract.shapes(geometry).values()))


@dataclass(frozen=True, slots=True)
class Hints:
    """Channels, heights and widths in cells (None for an unknown side), and batches that residuals are said to have."""

    widths: tuple[int, ...] = ()
    sizes: tuple[tuple[int | None, int | None], ...] = ()
    batches: tuple[int, ...] = ()

    @classmethod
    def of_shapes(cls, shapes: Iterable[Shape]) -> Hints:
        """Return the hints of residuals whose whole shape is known; other shapes give none."""
        whole = [
            shape for shape in dict.fromkeys(shapes) if len(shape) == 4 and all(0 < size <= _LARGEST_AXIS for size in shape)
        ]
        return cls(
            tuple(dict.fromkeys(shape[1] for shape in whole)),
            tuple(dict.fromkeys((shape[2], shape[3]) for shape in whole)),
            tuple(dict.fromkeys(shape[0] for shape in whole)),
        )

    @classmethod
    def of_axis(cls, axis: int, size: int) -> Hints:
        """Return the hint of one axis of (batch, channels, height, width)."""
        if not 0 < size <= _LARGEST_AXIS:
            return cls()
        return [cls(batches=(size,)), cls(widths=(size,)), cls(sizes=((size, None),)), cls(sizes=((None, size),))][axis]


FaultKind = Literal[
    "blocks", "layers", "family", "mid", "drop", "shift", "reverse", "constant", "floor", "transpose", "channels", "swap",
    "size", "batch", "rank", "pooled", "surplus", "stride", "width", "duplicate", "empty",
]  # fmt: skip
"""In the order of a report: a wrong rule before a spoilt table, and that before one wrong residual."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake, and the residuals that it leads to at one geometry."""

    kind: FaultKind
    message: str
    """The mistake in words; `change` says what to do instead."""
    change: str
    residuals: ResidualShapes
    slots: tuple[str, ...] = ()
    """The slots whose residuals were touched; empty if it is the whole table."""


@dataclass(frozen=True, slots=True)
class Level:
    """One size of the pyramid, and the channels that its attention layers have."""

    stride: int
    size: Size
    channels: int


@dataclass(frozen=True, slots=True)
class ResidualTable:
    """The right residuals of a UNet at one geometry, and its levels."""

    contract: Contract
    geometry: Geometry
    right: ResidualShapes
    levels: tuple[Level, ...]
    names: tuple[str, ...]
    """Names of the slots in order, mid last."""

    @classmethod
    def of(cls, contract: Contract, geometry: Geometry) -> ResidualTable:
        """Return the table of a contract. Raises ShapecheckError if the UNet refuses the geometry."""
        shapes = contract.shapes(geometry)
        sizes: dict[int, Level] = {}
        for slot, shape in zip(contract.slots, shapes.values(), strict=True):
            sizes[slot.stride] = Level(slot.stride, (shape[-2], shape[-1]), slot.channels)
        levels = list(sizes.values())
        widths = contract.config.get("block_out_channels") or ()
        if len(widths) == len(levels):  # the last slot of a level need not be as wide as the level
            levels = [Level(level.stride, level.size, width) for level, width in zip(levels, widths, strict=True)]
        return cls(contract, geometry, ResidualShapes.split(tuple(shapes.values())), tuple(levels), tuple(shapes))

    @property
    def downs(self) -> tuple[Shape, ...]:
        return self.right.downs

    @property
    def mid(self) -> Shape:
        assert self.right.mid is not None
        return self.right.mid

    @property
    def flat(self) -> tuple[Shape, ...]:
        """The right residuals in slot order, mid last."""
        return (*self.downs, self.mid)

    @property
    def latent(self) -> Size:
        return self.geometry.height, self.geometry.width

    def name_slot(self, index: int) -> str:
        """Return `slot 3`, or `mid` for the last."""
        return "mid" if index == len(self.names) - 1 else f"slot {index}"

    def name_residual(self, index: int) -> str:
        """Return `the residual of slot 3`, or `the mid residual` for the last."""
        return "the mid residual" if index == len(self.names) - 1 else f"the residual of slot {index}"

    def replace_shape(self, index: int, shape: Shape) -> ResidualShapes:
        """Return the right residuals with another shape at one slot."""
        return ResidualShapes.split((*self.flat[:index], shape, *self.flat[index + 1 :]))

    def complete_size(self, rows: int | None, columns: int | None, usual: Size) -> Iterator[Size]:
        """Yield sizes for one of which a side may be unknown: that side is then in proportion to the latents, or as usual."""
        height, width = self.latent
        if rows is not None and columns is not None:
            yield rows, columns
        elif rows is not None:
            yield rows, max(1, round(rows * width / height))
            yield rows, usual[1]
        elif columns is not None:
            yield max(1, round(columns * height / width)), columns
            yield usual[0], columns
