"""What a parity run proves, and by which calls: known from the contract and the sizes alone, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry
from shapecheck.parity.cases import Call
from shapecheck.parity.results import Check
from shapecheck.tensorrt.profiles import Range

FILE_KINDS = ("provider", "contract", "weights", "precision")
"""Checks that need no call."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A check, and the calls it is decided by, the judged one last; for `switch` all of them, in this order."""

    check: Check
    calls: tuple[Call, ...] = ()


def geometries_of(contract: Contract, ranges: Sequence[Range]) -> tuple[Geometry, ...]:
    """Each range's min, opt and max and an odd size between; without ranges three small sizes, of batch 2, 1 and 3."""
    if not ranges:
        step = contract.divisor
        return Geometry(2, 17 * step, 25 * step), Geometry(1, 24 * step, 40 * step), Geometry(3, 9 * step, 14 * step)
    several = (each for sizes in ranges for each in (*sizes.geometries, _between(sizes, contract.divisor)))
    return tuple(dict.fromkeys(several))


def _between(sizes: Range, divisor: int) -> Geometry:
    """A size between min and max whose sides are odd multiples of the divisor where there are any."""

    def odd(least: int, most: int, step: int) -> int:
        steps = range(-(-least // step), most // step + 1)
        found = [each for each in steps if each % 2] or list(steps)
        return found[len(found) // 2] * step

    low, high = sizes.min, sizes.max
    return Geometry(
        (low.batch + high.batch + 1) // 2,
        odd(low.height, high.height, divisor),
        odd(low.width, high.width, divisor),
        (low.tokens + high.tokens) // 2,
    )


def planned(contract: Contract, backend: str, geometries: Sequence[Geometry]) -> tuple[Planned, ...]:
    """Every check of one backend, in the order in which they explain each other."""
    small = min(geometries, key=lambda each: each.height * each.width * each.batch)
    off = Call(small)
    found = [Planned(Check(backend, kind, "")) for kind in FILE_KINDS]  # type: ignore[arg-type]  # mypy widens the literals
    found += [Planned(Check(backend, "input", each.name), (off, Call(small, perturbed=each.name))) for each in contract.inputs]
    found += [Planned(Check(backend, "slot", slot.name), (off, Call(small, perturbed=slot.name))) for slot in contract.slots]
    if contract.slots:
        even = [each for each in geometries if each.batch % 2 == 0]
        halves = min(even, key=lambda each: each.height * each.width * each.batch, default=None)
        found.append(Planned(Check(backend, "cfg", ""), (Call(halves), Call(halves, 0, half=True)) if halves else ()))
        found.append(Planned(Check(backend, "switch", ""), tuple(Call(small, frame) for frame in (0, None, 1, None, 0))))
    for geometry in geometries:
        for frame in (None, 0) if contract.slots else (None,):
            call = Call(geometry, frame)
            where = f"{geometry}, control {'off' if frame is None else 'on'}" if contract.slots else str(geometry)
            found.append(Planned(Check(backend, "case", where), (call,)))
    if contract.slots:
        pooled = Check(backend, "case", f"{small}, control on, pooled residuals")
        found.append(Planned(pooled, (Call(small, 0, pooled=True),)))
    return tuple(found)


def calls_of(plans: Sequence[Planned]) -> tuple[Call, ...]:
    """Every call, once."""
    return tuple(dict.fromkeys(call for each in plans for call in each.calls))
