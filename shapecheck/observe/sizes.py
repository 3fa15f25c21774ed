"""The sizes to observe, and the rules of observed sizes: chains of halvings, each ceil or floor as seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

from shapecheck.contract import Dim, Geometry
from shapecheck.contract.dims import Rounding

Sizes = tuple[int, ...]
"""One axis of one tensor, a number for each observed geometry."""


def list_survey_sizes(halvings: int) -> tuple[Geometry, ...]:
    """Return the geometries every probe observes: batch 2, height ≠ width, both sides ≡ 1, 3, 5 and 7 modulo 8.

    Up to three halvings these meet an odd size at every level, whatever the rounding of the levels before;
    for deeper UNets `odd_geometry` gives the rest.
    """
    deepest = 2 ** max(3, halvings)
    step = deepest + 2  # no two geometries fall together even at the deepest level
    return tuple(Geometry(2, 2 * deepest + 1 + number * step, 8 * deepest - 1 - number * step) for number in range(4))


def list_coarse_sizes(divisor: int, halvings: int) -> tuple[Geometry, ...]:
    """Return four odd multiples of `divisor`, for a model that takes only its multiples and halves them at the levels left."""
    if divisor == 1:
        return list_survey_sizes(halvings)
    least = 2 ** max(2, halvings + 2 - divisor.bit_length()) + 1
    factors = [(least + 2 * number, 2 * least + 5 - 2 * number) for number in range(4)]
    return tuple(Geometry(2, divisor * height, divisor * width) for height, width in factors)


def odd_geometry(level: int) -> Geometry:
    """Return a geometry whose sides are odd after `level` halvings of any rounding."""
    return Geometry(2, 17 * 2**level, 19 * 2**level)


def list_multiples(divisor: int, halvings: int) -> tuple[Geometry, ...]:
    """Return multiples of `divisor` that are odd at each level it leaves open: one geometry a level, large enough to halve."""
    first = divisor.bit_length() - 1
    levels = range(first, max(first + 1, halvings))
    smallest = {level: max(3, 2 ** max(0, halvings + 1 - level)) | 1 for level in levels}
    return tuple(Geometry(2, 2**level * factor, 2**level * (factor + 2)) for level, factor in smallest.items())


def derive_rules(symbol: str, source: Sizes, observed: Iterable[Sizes]) -> Mapping[Sizes, Dim]:
    """Return every observed size as halvings of the source's, each measured from the level before it.

    Sizes that no chain of halvings explains are left out.
    """
    rules: dict[Sizes, Dim] = {source: Dim(symbol)}
    for sizes in sorted(set(observed) - {source}, reverse=True):
        for previous, dim in reversed(rules.items()):
            if (steps := _find_halvings(previous, sizes)) is not None:
                rules[sizes] = Dim(symbol, 1, dim.halvings + steps)
                break
    return rules


def _find_halvings(previous: Sizes, current: Sizes) -> tuple[Rounding, ...] | None:
    """Return the shortest chain of halvings from one level to the next that holds at every geometry, or None.

    A step whose rounding the geometries do not show is `exact`.
    """
    roundings: tuple[Rounding, ...] = ("ceil", "floor")
    for count in range(1, 5):  # no UNet halves more often from one level to the next
        chains = [
            chain
            for chain in product(roundings, repeat=count)
            if all(Dim("x", 1, chain).at({"x": start}) == end for start, end in zip(previous, current, strict=True))
        ]
        if chains:
            return tuple(steps[0] if len(set(steps)) == 1 else "exact" for steps in zip(*chains, strict=True))
    return None
