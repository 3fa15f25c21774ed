"""What is wrong with a profile: every input that is not the image of the one range that the others have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shapecheck.contract.contract import Contract, ContractError
from shapecheck.contract.dims import Dim, show
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.mismatch import Port, compare, compare_inputs
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt.profiles import Bounds, Profile, Range, range_of


def mismatches(contract: Contract, profile: Profile) -> tuple[Mismatch, ...]:
    """Everything that is wrong with a profile: empty where its inputs are those of the contract, all images of one range.

    An input that is missing would be filled with 1 by builders in silence: the slot then takes (1, channels, 1, 1).
    """
    rules, count = contract.input_rules, Counter(bounds.name for bounds in profile.inputs)
    needed = {name: rule for name, rule in rules.items() if name in count or any(dim.symbol is not None for dim in rule)}
    found = [
        *_disordered(profile),
        *compare_inputs(
            needed,
            contract.input_dtypes,
            [Port(bounds.name, bounds.dtype) for bounds in profile.inputs],
            producers={slot.name: slot.producer for slot in contract.residuals},
            absent="not in the profile",
            present="in the profile",
            cause="TensorRT would fill every dynamic axis with 1, and Polygraphy only logs it",
        ),
        *(Mismatch("surplus", name, f"{times} times in the profile", "once") for name, times in count.items() if times > 1),
    ]
    try:
        sizes = range_of(contract, profile)
        for geometry in sizes.geometries:
            contract.require(geometry)
    except ShapecheckError as error:
        return (*found, Mismatch("sizes", "the profile", str(error), "a range the model takes"))
    known = [bounds for bounds in profile.inputs if bounds.name in rules]
    found += [wrong for bounds in known if (wrong := _no_image(contract, bounds, rules[bounds.name], sizes)) is not None]
    order = {name: place for place, name in enumerate(rules)}
    return tuple(sorted(found, key=lambda each: order.get(each.where, len(order))))


def verify(contract: Contract, profiles: Sequence[Profile]) -> None:
    """Raise ContractError with everything that is wrong with these profiles, or return in silence."""
    if not profiles:
        raise ShapecheckError("no profile was given; an engine with dynamic inputs needs one")
    found = [each for profile in profiles for each in mismatches(contract, profile)]
    if found:
        raise ContractError(tuple(found), subject="the profile is not what the contract says", contract=contract)


def _disordered(profile: Profile) -> Iterator[Mismatch]:
    for each in profile.inputs:
        if len({len(shape) for shape in each.shapes}) > 1:
            yield Mismatch("rank", each.name, str(each), "three shapes of as many axes")
        elif not all(a <= b <= c for a, b, c in zip(*each.shapes, strict=True)):
            yield Mismatch("range", each.name, str(each), "min ≤ opt ≤ max on every axis")


def _no_image(contract: Contract, given: Bounds, rule: tuple[Dim, ...], sizes: Range) -> Mismatch | None:
    """What is wrong with one input's bounds: told of the first of max, min and opt that is not the image of its geometry."""
    for bound in ("max", "min", "opt"):
        geometry, shape = getattr(sizes, bound), getattr(given, bound)
        expected = geometry.shape_of(rule)
        if shape == expected:
            continue
        slots = contract.residuals if contract.role == "unet" else ()
        found = compare(slots, geometry, {given.name: shape}, inputs=contract.inputs)
        wrong = next(mismatch for mismatch in found if mismatch.where == given.name)
        return replace(wrong, observed=f"{bound} {show(shape)}", expected=f"{bound} {show(expected)}")
    return None
