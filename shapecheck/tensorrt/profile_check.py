"""What is wrong with a profile: every input that is not the image of the one range that the others have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shapecheck.contract.contract import Contract, ContractError, dtypes_of, rules_of
from shapecheck.contract.dims import Dim, show
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.mismatch import compare, kind_of
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt.profiles import Bounds, Profile, Range, range_of, shape_at


def mismatches(contract: Contract, profile: Profile) -> tuple[Mismatch, ...]:
    """Everything that is wrong with a profile: empty where its inputs are those of the contract, all images of one range.

    An input that is missing would be filled with 1 by builders in silence: the slot then takes (1, channels, 1, 1).
    """
    rules, dtypes = rules_of(contract), dtypes_of(contract)
    producers = {slot.name: slot.producer for slot in contract.residuals}
    found = [*_disordered(profile), *_misnamed(rules, profile, producers)]
    try:
        sizes = range_of(contract, profile)
        for geometry in sizes.geometries:
            contract.require(geometry)
    except ShapecheckError as error:
        return (*found, Mismatch("sizes", "the profile", str(error), "a range the model takes"))
    for each in profile.inputs:
        if each.name not in rules:
            continue
        if each.dtype != dtypes[each.name]:
            found.append(Mismatch("dtype", each.name, each.dtype, dtypes[each.name], None, producers.get(each.name, "")))
        if (wrong := _no_image(contract, each, rules[each.name], sizes)) is not None:
            found.append(wrong)
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


def _misnamed(rules: Mapping[str, tuple[Dim, ...]], profile: Profile, producers: Mapping[str, str]) -> Iterator[Mismatch]:
    given = Counter(each.name for each in profile.inputs)
    for name, rule in rules.items():
        if name not in given and any(dim.symbol is not None for dim in rule):
            cause = "TensorRT would fill every dynamic axis with 1, and Polygraphy only logs it"
            yield Mismatch("missing", name, "not in the profile", show(rule), None, producers.get(name, ""), cause=cause)
    for name, count in given.items():
        if name not in rules:
            yield Mismatch("surplus", name, "in the profile", "no such input")
        elif count > 1:
            yield Mismatch("surplus", name, f"{count} times in the profile", "once")


def _no_image(contract: Contract, given: Bounds, rule: tuple[Dim, ...], sizes: Range) -> Mismatch | None:
    """What is wrong with one input's bounds: told of the first of max, min and opt that is not the image of its geometry."""
    for bound in ("max", "min", "opt"):
        geometry, shape = getattr(sizes, bound), getattr(given, bound)
        expected = shape_at(rule, geometry)
        if shape == expected:
            continue
        slots = [slot for slot in contract.residuals if slot.name == given.name and contract.role == "unet"]
        if slots:
            wrong = next(
                each for each in compare(contract.residuals, geometry, {given.name: shape}) if each.where == given.name
            )
        else:
            wrong = Mismatch(kind_of(rule, shape, expected), given.name, shape, expected, geometry)
        return replace(wrong, observed=f"{bound} {show(shape)}", expected=f"{bound} {show(expected)}")
    return None
