"""Families of UNets: presets whose slots are the same, and the residuals that a ControlNet of each emits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from shapecheck import presets
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.faults.given import Given, right


@cache
def families() -> tuple[tuple[tuple[str, ...], Contract], ...]:
    """Presets whose slots differ, each with the names of all that share them."""
    groups: dict[object, list[str]] = {}
    for name, contract in presets.contracts().items():
        groups.setdefault(tuple(slot.shape for slot in contract.slots), []).append(name)
    return tuple((tuple(sorted(names, key=len)), presets.contract(names[0])) for names in groups.values())


def emitted_at(contract: Contract, geometry: Geometry) -> Given:
    """What a ControlNet made for that UNet emits, also at a size that the UNet itself refuses."""
    try:
        return right(contract, geometry)
    except ShapecheckError:  # nothing stops a ControlNet from emitting it
        return right(replace(contract, divisor=1), geometry)
