"""Which sizes to observe, and how observed sizes become rules: chains of halvings, each ceil or floor as seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

from shapecheck.contract import Dim, Geometry
from shapecheck.contract.dims import Rounding

_MOST_HALVINGS_AT_ONCE = 4
_ROUNDINGS: tuple[Rounding, ...] = ("ceil", "floor")

Sizes = tuple[int, ...]
"""One axis of one tensor, a number for each observed geometry."""


def list_survey_sizes(halvings: int) -> tuple[Geometry, ...]:
    """The geometries every probe observes: batch 2, height ≠ width, both sides ≡ 1, 3, 5 and 7 modulo 8.

    Up to three halvings these meet an odd size at every level, whatever the rounding of the levels before;
    for deeper UNets `odd_geometry` gives the rest.
    """
    deepest = 2 ** max(3, halvings)
    step = deepest + 2  # no two geometries fall together even at the deepest level
    return tuple(Geometry(2, 2 * deepest + 1 + each * step, 8 * deepest - 1 - each * step) for each in range(4))


def list_coarse_sizes(divisor: int, halvings: int) -> tuple[Geometry, ...]:
    """The same for a model that takes only multiples of `divisor`: four odd multiples of it, which the levels left halve."""
    if divisor == 1:
        return list_survey_sizes(halvings)
    least = 2 ** max(2, halvings + 2 - divisor.bit_length()) + 1
    return tuple(Geometry(2, divisor * (least + 2 * each), divisor * (2 * least + 5 - 2 * each)) for each in range(4))


def odd_geometry(level: int) -> Geometry:
    """A geometry whose sides are odd after `level` halvings of any rounding."""
    return Geometry(2, 17 * 2**level, 19 * 2**level)


def list_multiples(divisor: int, halvings: int) -> tuple[Geometry, ...]:
    """Multiples of `divisor` that are odd at each level it leaves open, one geometry a level, large enough to halve."""
    first = divisor.bit_length() - 1
    levels = range(first, max(first + 1, halvings))
    smallest = {level: max(3, 2 ** max(0, halvings + 1 - level)) | 1 for level in levels}
    return tuple(Geometry(2, 2**level * factor, 2**level * (factor + 2)) for level, factor in smallest.items())


def derive_rules(symbol: str, given: Sizes, observed: Iterable[Sizes]) -> Mapping[Sizes, Dim]:
    """The expression of every observed size as halvings of the given one, each measured from the level before it.

    Sizes that no chain of halvings explains are left out.
    """
    known: dict[Sizes, Dim] = {given: Dim(symbol)}
    for sizes in sorted(set(observed) - {given}, reverse=True):
        for previous, dim in reversed(known.items()):
            if (steps := find_halvings(previous, sizes)) is not None:
                known[sizes] = Dim(symbol, 1, dim.halvings + steps)
                break
    return known


def find_halvings(previous: Sizes, current: Sizes) -> tuple[Rounding, ...] | None:
    """The shortest chain of halvings from one level to the next that holds at every geometry.

    A step whose rounding the geometries do not show is `exact`; None where no chain holds.
    """
    for count in range(1, _MOST_HALVINGS_AT_ONCE + 1):
        chains = [
            chain
            for chain in product(_ROUNDINGS, repeat=count)
            if all(Dim("x", 1, chain).at({"x": start}) == end for start, end in zip(previous, current, strict=True))
        ]
        if chains:
            return tuple(steps[0] if len(set(steps)) == 1 else "exact" for steps in zip(*chains, strict=True))
    return None
