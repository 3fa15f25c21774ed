"""The contract: what one UNet takes, slot by slot. Everything downstream reads this and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shapecheck.contract import serial
from shapecheck.contract.compare import compare
from shapecheck.contract.config import Config
from shapecheck.contract.dims import Shape
from shapecheck.contract.errors import ContractError, ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import Header, Input, Mismatch, Slot


@dataclass(frozen=True, slots=True)
class Contract:
    """Base inputs, slots and identity of a UNet, as observed.

    Two contracts are equal, and share a digest, when class, inputs, slots, config and divisor agree;
    the header (where it came from, library versions) never counts.
    """

    unet: str
    """Class name of the UNet."""
    inputs: tuple[Input, ...]
    slots: tuple[Slot, ...]
    config: Config
    divisor: int = 1
    """Latent height and width must be multiples of this; 1 where every size runs."""
    header: Header = field(default_factory=Header, compare=False)

    @property
    def digest(self) -> str:
        """`sha256:…` over everything that counts in equality, the same on every machine and release."""
        return serial.digest(self)

    def slot(self, name: str) -> Slot:
        """The slot of that name. Raises ShapecheckError listing the known names."""
        for slot in self.slots:
            if slot.name == name:
                return slot
        raise ShapecheckError(f"no slot {name!r}; this contract has {', '.join(slot.name for slot in self.slots)}")

    def shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """Slot name → (batch, channels, height, width) of its residual, in slot order; sizes in slot cells.

        Raises ShapecheckError where the UNet refuses the geometry.
        """
        self.require(geometry)
        return {slot.name: slot.shape_at(geometry) for slot in self.slots}

    def input_shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """The shape of every input an exported UNet has: base inputs first, then the slots."""
        self.require(geometry)
        return {each.name: each.shape_at(geometry) for each in self.inputs} | self.shapes(geometry)

    def require(self, geometry: Geometry) -> None:
        """Raise ShapecheckError unless the UNet accepts this geometry."""
        if geometry.height % self.divisor or geometry.width % self.divisor:
            raise ShapecheckError(
                f"this UNet refuses latents of {geometry.height}×{geometry.width}: both must be multiples of {self.divisor}"
            )

    def mismatches(self, shapes: Mapping[str, Any] | Sequence[Any], geometry: Geometry | None = None) -> tuple[Mismatch, ...]:
        """Every disagreement between given residuals and the slots; empty when all is well.

        `shapes` is a mapping by slot name, the pair (downs, mid) a ControlNet returns, or a flat sequence with mid last;
        each entry is a shape or anything that has one. Without `geometry` batch, height and width are read
        off slot 0, whose stride is 1.
        """
        given = _by_name(shapes)
        return compare(self.slots, geometry or self._geometry_of(given), given)

    def verify(self, shapes: Mapping[str, Any] | Sequence[Any], geometry: Geometry | None = None) -> None:
        """Raise ContractError with every mismatch, or return in silence."""
        if found := self.mismatches(shapes, geometry):
            raise ContractError(found, subject="the residuals do not fit this UNet", contract=self)

    def to_json(self) -> str:
        """The contract as JSON text; `from_json` is the inverse."""
        return serial.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, an edited file included."""
        fields, claimed = serial.fields(text)
        contract = cls(**fields)
        if contract.digest != claimed:
            raise ShapecheckError(
                f"an edited contract: its digest says {claimed}, its contents give {contract.digest}; probe the model again"
            )
        return contract

    def _geometry_of(self, given: Mapping[str, Shape]) -> Geometry:
        first = given.get(self.slots[0].name, ())
        if len(first) != 4:
            raise ShapecheckError(
                f"{self.slots[0].name} gives no size to check against; pass geometry=Geometry(batch, height, width)"
            )
        batch, _, height, width = first
        return Geometry(batch, height, width)


def _by_name(shapes: Mapping[str, Any] | Sequence[Any]) -> dict[str, Shape]:
    """Slot name → shape, from any of the forms `Contract.mismatches` takes."""
    if isinstance(shapes, Mapping):
        return {name: _shape(value) for name, value in shapes.items()}
    downs, mid = shapes if _is_pair(shapes) else (shapes[:-1], shapes[-1] if shapes else None)
    named = {SHAPECHECK.down(index): _shape(value) for index, value in enumerate(downs)}
    return named if mid is None else named | {SHAPECHECK.mid: _shape(mid)}


def _is_pair(shapes: Sequence[Any]) -> bool:
    """Whether these are (downs, mid) rather than two shapes in a row."""
    return len(shapes) == 2 and not hasattr(shapes[0], "shape") and not any(isinstance(each, int) for each in shapes[0])


def _shape(value: Any) -> Shape:
    """The shape of a tensor, or a shape given as such."""
    return tuple(int(size) for size in getattr(value, "shape", value))
