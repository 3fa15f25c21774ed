"""The residuals a UNet is given: shapes alone, in the order the call has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry, Shape
from shapecheck.contract.naming import SHAPECHECK


@dataclass(frozen=True, slots=True)
class Given:
    """Shapes of the down residuals in order, and of the mid one, each (batch, channels, height, width)."""

    downs: tuple[Shape, ...]
    mid: Shape | None
    """None where no mid residual is given: diffusers then takes the down residuals for T2I-Adapter features."""

    @property
    def named(self) -> Mapping[str, Shape]:
        """By the name of the slot each arrives at."""
        named = {SHAPECHECK.down(index): shape for index, shape in enumerate(self.downs)}
        return named if self.mid is None else named | {SHAPECHECK.mid: self.mid}

    def __len__(self) -> int:
        return len(self.downs) + (self.mid is not None)


def right(contract: Contract, geometry: Geometry) -> Given:
    """What the UNet of this contract takes at that geometry. Raises ShapecheckError where it refuses it."""
    *downs, mid = contract.shapes(geometry).values()
    return Given(tuple(downs), mid)


Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Level:
    """One size of the pyramid: its stride, height and width in cells, and the channels its attention layers have."""

    stride: int
    size: Size
    channels: int


@dataclass(frozen=True, slots=True)
class Table:
    """The right residuals of a UNet at one geometry, and its levels."""

    contract: Contract
    geometry: Geometry
    right: Given
    levels: tuple[Level, ...]
    names: tuple[str, ...]
    """Of the slots, in order, mid last."""

    @classmethod
    def of(cls, contract: Contract, geometry: Geometry) -> Table:
        """Raises ShapecheckError where the UNet refuses the geometry."""
        sizes: dict[int, Level] = {}
        for slot, shape in zip(contract.slots, contract.shapes(geometry).values(), strict=True):
            sizes[slot.stride] = Level(slot.stride, (shape[-2], shape[-1]), slot.channels)
        levels = list(sizes.values())
        widths = contract.config.get("block_out_channels") or ()
        if len(widths) == len(levels):  # the last slot of a level need not be as wide as the level
            levels = [Level(each.stride, each.size, width) for each, width in zip(levels, widths, strict=True)]
        names = tuple(slot.name for slot in contract.slots)
        return cls(contract, geometry, right(contract, geometry), tuple(levels), names)

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
    def latent(self) -> Size:
        """Height and width in latent cells."""
        return self.geometry.height, self.geometry.width

    def place(self, at: int) -> str:
        """The slot of that number in words; mid is the last."""
        return "mid" if at == len(self.names) - 1 else f"slot {at}"

    def residual(self, at: int) -> str:
        """The residual of that slot in words."""
        return "the mid residual" if at == len(self.names) - 1 else f"the residual of slot {at}"

    def changed(self, at: int, shape: Shape) -> Given:
        """The right residuals with another shape at one slot; mid is the last."""
        flat = [*self.downs, self.mid]
        flat[at] = shape
        return Given(tuple(flat[:-1]), flat[-1])
