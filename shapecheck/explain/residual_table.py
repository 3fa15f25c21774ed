"""The residuals of a call as shapes, and what a UNet takes at one geometry, of which mistakes are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry, Shape
from shapecheck.contract.naming import SHAPECHECK

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RequestedSize:
    """The size a user says a text or a table is about. None leaves it open: every size that can have led to it is tried."""

    latent: Size | None = None
    """Height and width in cells."""
    batch: int | None = None

    def complete(self, contract: Contract) -> Geometry:
        """Return the geometry, with the model's own size for what is left open."""
        return Geometry(self.batch or 1, *(self.latent or contract.header.usual))


@dataclass(frozen=True, slots=True)
class ResidualShapes:
    """Shapes of the down residuals in order, and of the mid one, each (batch, channels, height, width)."""

    downs: tuple[Shape, ...]
    mid: Shape | None
    """None if no mid residual is given: diffusers then takes the down residuals for T2I-Adapter features."""

    @classmethod
    def split(cls, flat: Sequence[Shape]) -> ResidualShapes:
        """Make them of all shapes in slot order, mid last."""
        return cls(tuple(flat[:-1]), flat[-1])

    @property
    def named(self) -> Mapping[str, Shape]:
        """By the name of the slot each arrives at."""
        named = {SHAPECHECK.down(index): shape for index, shape in enumerate(self.downs)}
        return named if self.mid is None else named | {SHAPECHECK.mid: self.mid}

    def __len__(self) -> int:
        return len(self.downs) + (self.mid is not None)


def right_shapes(contract: Contract, geometry: Geometry) -> ResidualShapes:
    """Return what the UNet of this contract takes at that geometry. Raises ShapecheckError if it refuses it."""
    return ResidualShapes.split(tuple(contract.shapes(geometry).values()))


@dataclass(frozen=True, slots=True)
class Level:
    """One size of the pyramid: its stride, height and width in cells, and the channels its attention layers have."""

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
    """Of the slots, in order, mid last."""

    @classmethod
    def of(cls, contract: Contract, geometry: Geometry) -> ResidualTable:
        """Raises ShapecheckError if the UNet refuses the geometry."""
        right = right_shapes(contract, geometry)
        sizes: dict[int, Level] = {}
        for slot, shape in zip(contract.slots, contract.shapes(geometry).values(), strict=True):
            sizes[slot.stride] = Level(slot.stride, (shape[-2], shape[-1]), slot.channels)
        levels = list(sizes.values())
        widths = contract.config.get("block_out_channels") or ()
        if len(widths) == len(levels):  # the last slot of a level need not be as wide as the level
            levels = [Level(level.stride, level.size, width) for level, width in zip(levels, widths, strict=True)]
        return cls(contract, geometry, right, tuple(levels), tuple(slot.name for slot in contract.slots))

    @property
    def downs(self) -> tuple[Shape, ...]:
        """The right down residuals."""
        return self.right.downs

    @property
    def mid(self) -> Shape:
        """The right mid residual."""
        assert self.right.mid is not None
        return self.right.mid

    @property
    def flat(self) -> tuple[Shape, ...]:
        """The right residuals in slot order, mid last."""
        return (*self.downs, self.mid)

    @property
    def latent(self) -> Size:
        """Height and width in latent cells."""
        return self.geometry.height, self.geometry.width

    def name_slot(self, index: int) -> str:
        """Name the slot of that number in words; mid is the last."""
        return "mid" if index == len(self.names) - 1 else f"slot {index}"

    def name_residual(self, index: int) -> str:
        """Name the residual of that slot in words; mid is the last."""
        return "the mid residual" if index == len(self.names) - 1 else f"the residual of slot {index}"

    def replace_shape(self, index: int, shape: Shape) -> ResidualShapes:
        """Return the right residuals with another shape at one slot; mid is the last."""
        return ResidualShapes.split((*self.flat[:index], shape, *self.flat[index + 1 :]))
