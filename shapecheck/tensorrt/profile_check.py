"""The check of a profile: every input has to be the image of the one range that the others have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from shapecheck.contract.contract import Contract, ContractError
from shapecheck.contract.dims import Dim, show
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.mismatch import Port, compare, compare_inputs
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt.profiles import Bounds, Profile, Range, range_of


def find_mismatches(contract: Contract, profile: Profile) -> tuple[Mismatch, ...]:
    """Return everything that is wrong with a profile; empty if its inputs are the contract's, all images of one range.

    An input that is missing would be filled with 1 by builders in silence: the slot then accepts (1, channels, 1, 1).
    """
    rules, count = contract.input_rules, Counter(bounds.name for bounds in profile.inputs)
    mismatches = []
    for bounds in profile.inputs:
        if len({len(shape) for shape in bounds.shapes}) > 1:
            mismatches.append(Mismatch("rank", bounds.name, str(bounds), "three shapes of as many axes"))
        elif not all(least <= usual <= most for least, usual, most in zip(*bounds.shapes, strict=True)):
            mismatches.append(Mismatch("range", bounds.name, str(bounds), "min ≤ opt ≤ max on every axis"))
    mismatches += compare_inputs(
        {name: rule for name, rule in rules.items() if name in count or any(dim.symbol is not None for dim in rule)},
        contract.input_dtypes,
        [Port(bounds.name, bounds.dtype) for bounds in profile.inputs],
        producers={slot.name: slot.producer for slot in contract.residuals},
        absent="not in the profile",
        present="in the profile",
        cause="TensorRT would fill every dynamic axis with 1, and Polygraphy only logs it",
    )
    repeated = [(name, times) for name, times in count.items() if times > 1]
    mismatches += [Mismatch("surplus", name, f"{times} times in the profile", "once") for name, times in repeated]
    try:
        sizes = range_of(contract, profile)
        for geometry in sizes.geometries:
            contract.require(geometry)
    except ShapecheckError as error:
        return (*mismatches, Mismatch("sizes", "the profile", str(error), "a range the model accepts"))
    known = [bounds for bounds in profile.inputs if bounds.name in rules]
    mismatches += filter(None, (_compare_bounds(contract, bounds, rules[bounds.name], sizes) for bounds in known))
    order = {name: place for place, name in enumerate(rules)}
    return tuple(sorted(mismatches, key=lambda mismatch: order.get(mismatch.where, len(order))))


def verify(contract: Contract, profiles: Sequence[Profile]) -> None:
    """Raise ContractError with everything that is wrong with these profiles, or return in silence."""
    if not profiles:
        raise ShapecheckError("no profile was given; an engine with dynamic inputs needs one")
    mismatches = [mismatch for profile in profiles for mismatch in find_mismatches(contract, profile)]
    if mismatches:
        raise ContractError(tuple(mismatches), subject="the profile does not fit the contract", contract=contract)


def _compare_bounds(contract: Contract, bounds: Bounds, rule: tuple[Dim, ...], sizes: Range) -> Mismatch | None:
    """Return the first of max, min and opt of an input that is not the image of its geometry, or None."""
    for bound in ("max", "min", "opt"):
        geometry, shape = getattr(sizes, bound), getattr(bounds, bound)
        expected = geometry.shape_of(rule)
        if shape != expected:
            slots = contract.residuals if contract.role == "unet" else ()
            mismatches = compare(slots, geometry, {bounds.name: shape}, inputs=contract.inputs)
            wrong = next(mismatch for mismatch in mismatches if mismatch.where == bounds.name)
            return replace(wrong, observed=f"{bound} {show(shape)}", expected=f"{bound} {show(expected)}")
    return None
