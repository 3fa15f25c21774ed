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
