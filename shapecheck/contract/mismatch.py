"""Given shapes against the slots that take them: every disagreement at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shapecheck.contract.dims import Dim, Shape
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.records import Mismatch, MismatchKind, Slot


def compare(
    slots: Sequence[Slot], geometry: Geometry, given: Mapping[str, Shape], *, makers: Mapping[str, str] | None = None
) -> tuple[Mismatch, ...]:
    """What is wrong when these residuals meet these slots, in slot order, surplus residuals last.

    `given` maps slot names to shapes (batch, channels, height, width), height and width in slot cells.
    `makers` maps the same names to the paths of the modules that made the residuals, for the report.
    """
    table = {slot.name: slot.shape_at(geometry) for slot in slots}
    makers = makers or {}
    found = []
    for slot in slots:
        expected, shape = table[slot.name], given.get(slot.name)
        if shape is None:
            found.append(Mismatch("missing", slot.name, "nothing", expected, geometry, slot.producer))
        elif shape != expected:
            kind, cause = _diagnosis(expected, shape, table)
            maker = makers.get(slot.name, "")
            found.append(Mismatch(kind, slot.name, shape, expected, geometry, slot.producer, maker, cause))
    surplus = [
        Mismatch("surplus", name, shape, "no such slot", geometry, "", makers.get(name, ""), "the UNet ignores it in silence")
        for name, shape in given.items()
        if name not in table
    ]
    return (*found, *surplus)


def kind_of(rule: tuple[Dim, ...], shape: Shape, expected: Shape) -> MismatchKind:
    """In what the shape of an input is not what its rule gives."""
    if len(shape) != len(expected):
        return "rank"
    wrong = {dim.symbol for dim, size, wanted in zip(rule, shape, expected, strict=True) if size != wanted}
    if None in wrong:
        return "channels"
    return "batch" if wrong == {"batch"} else "size"


def _diagnosis(expected: Shape, given: Shape, table: Mapping[str, Shape]) -> tuple[MismatchKind, str]:
    """The kind of a disagreement in one slot, and what the other slots say of it."""
    if len(given) != len(expected):
        return "rank", f"{len(given)} axes where (batch, channels, height, width) are needed"
    owners = [name for name, shape in table.items() if shape == given]
    belongs = f"this is the shape of {_listed(owners)}" if owners else ""
    if given[1] != expected[1]:
        return "channels", belongs
    if given[0] != expected[0]:
        return "batch", "PyTorch broadcasts a batch of 1 in silence" if given[0] == 1 else ""
    if given[2:] == expected[2:][::-1]:
        return "size", "height and width are exchanged"
    if given[2:] == (1, 1):
        return "broadcast", "1×1 is broadcast in silence; only pooled slots may do that"
    if all(abs(got - want) <= 1 for got, want in zip(given[2:], expected[2:], strict=True)):
        return "rounding", "off by one: the sizes were halved with another rounding than the UNet's"
    return "size", belongs


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
