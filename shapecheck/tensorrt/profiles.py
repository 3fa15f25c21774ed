"""Optimization profiles: (min, opt, max) of every dynamic input, each the image of one geometry under the contract.

They are made, chosen for a call, and checked here; `profile_formats` writes and reads them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shapecheck.contract.contract import Contract, ContractError
from shapecheck.contract.dims import Dim, Shape, show
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import AXES, USUAL_TOKENS, Geometry
from shapecheck.contract.mismatch import Port, compare_inputs, compare_shapes
from shapecheck.contract.records import Mismatch

BOUNDS = ("min", "opt", "max")
_SIZES = {"limits": (1, 2**31 - 1)}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The smallest, usual and largest shape of one input."""

    name: str
    dtype: str
    min: Shape = field(metadata=_SIZES)
    opt: Shape = field(metadata=_SIZES)
    max: Shape = field(metadata=_SIZES)

    def __post_init__(self) -> None:
        for bound in BOUNDS:
            object.__setattr__(self, bound, tuple(getattr(self, bound)))

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        return self.min, self.opt, self.max

    def allows(self, shape: Shape) -> bool:
        same_rank = len(shape) == len(self.min)
        return same_rank and all(least <= size <= most for least, size, most in zip(self.min, shape, self.max, strict=True))

    def __str__(self) -> str:
        return " … ".join(dict.fromkeys(map(show, self.shapes)))


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimization profile: the bounds of every dynamic input, in the contract's order."""

    inputs: tuple[Bounds, ...]

    def bounds(self, name: str) -> Bounds | None:
        """Return the bounds of one input, or None if it is not in the profile."""
        return next((bounds for bounds in self.inputs if bounds.name == name), None)

    def allows(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether the engine accepts these shapes together; inputs that are not in the profile do not count."""
        return all(bounds.allows(shapes[bounds.name]) for bounds in self.inputs if bounds.name in shapes)

    def renamed(self, names: Mapping[str, str]) -> Profile:
        """Return the profile with other names of inputs: from the contract's names to a file's, or back."""
        return Profile(tuple(replace(bounds, name=names.get(bounds.name, bounds.name)) for bounds in self.inputs))


@dataclass(frozen=True, slots=True)
class Range:
    """The geometries that a profile is the image of."""

    min: Geometry
    opt: Geometry
    max: Geometry

    @property
    def geometries(self) -> tuple[Geometry, Geometry, Geometry]:
        return self.min, self.opt, self.max

    @property
    def is_static(self) -> bool:
        return self.min == self.opt == self.max

    def outside(self, geometry: Geometry) -> tuple[str, ...]:
        """Return one text for each axis of a geometry that is not between min and max."""
        reasons = []
        for axis in AXES.values():
            least, size, most = (getattr(bound, axis) for bound in (self.min, geometry, self.max))
            if not least <= size <= most:
                reasons.append(f"{axis} {size}, expected {least if least == most else f'{least} to {most}'}")
        return tuple(reasons)

    def nearest(self, geometry: Geometry) -> Geometry:
        """Return the geometry between min and max that is nearest to another."""
        bounds = self.min, geometry, self.max
        return Geometry(**{axis: sorted(getattr(bound, axis) for bound in bounds)[1] for axis in AXES.values()})

    def with_(self, geometry: Geometry) -> Range:
        """Return the smallest range that holds another geometry too."""
        least = {axis: min(getattr(self.min, axis), getattr(geometry, axis)) for axis in AXES.values()}
        most = {axis: max(getattr(self.max, axis), getattr(geometry, axis)) for axis in AXES.values()}
        return Range(Geometry(**least), self.opt, Geometry(**most))

    def __str__(self) -> str:
        return " … ".join(dict.fromkeys(map(str, self.geometries)))


def profile_of(contract: Contract, sizes: Range) -> Profile:
    """Return the profile that serves every geometry from `sizes.min` to `sizes.max`, tuned for `sizes.opt`.

    It has one entry for each input with an axis that varies, slots of a UNet included. Raises ShapecheckError if the range
    does not ascend, or the model refuses one of its sizes, naming it.
    """
    for axis in AXES.values():
        least, usual, most = (getattr(geometry, axis) for geometry in sizes.geometries)
        if not least <= usual <= most:
            raise ShapecheckError(
                f"not a range: the {axis} is {least}, {usual}, {most}; give the smallest size, then the usual, then the largest"
            )
    for bound, geometry in zip(BOUNDS, sizes.geometries, strict=True):
        factor = contract.header.vae_factor
        size = f"{bound}, {geometry.width * factor}x{geometry.height * factor} pixels"
        try:
            shapes = contract.input_shapes(geometry)
        except ShapecheckError as error:
            raise ShapecheckError(f"{size}: {error}") from None
        if empty := next((name for name, shape in shapes.items() if 0 in shape), None):
            raise ShapecheckError(f"{size}: {empty} would be {show(shapes[empty])}: too small to halve")
    dtypes = contract.input_dtypes
    return Profile(
        tuple(
            Bounds(name, dtypes[name], *(geometry.shape_of(rule) for geometry in sizes.geometries))
            for name, rule in contract.input_rules.items()
            if any(dim.symbol is not None for dim in rule)
        )
    )


def range_of(contract: Contract, profile: Profile) -> Range:
    """Return the geometries that a profile is the image of, as most of its inputs have them.

    Raises ShapecheckError if no input shows one of the sizes, or a size is below 1.
    """
    votes = {axis: [Counter[int]() for _ in BOUNDS] for axis in AXES.values()}
    for name, rule in contract.input_rules.items():
        if (bounds := profile.bounds(name)) is not None and {len(shape) for shape in bounds.shapes} == {len(rule)}:
            for axis, dim in enumerate(rule):
                if dim.symbol is not None and dim == Dim(dim.symbol):
                    for vote, shape in zip(votes[AXES[dim.symbol]], bounds.shapes, strict=True):
                        vote[shape[axis]] += 1
    usual = {"tokens": USUAL_TOKENS}
    if unseen := [axis for axis, counts in votes.items() if not counts[0] and axis not in usual]:
        raise ShapecheckError(f"no input of the profile shows the {' and the '.join(unseen)}: is `sample` in it?")
    return Range(*(Geometry(**usual | {f: counts[at].most_common(1)[0][0] for f, counts in votes.items() if counts[at]})
                   for at in range(len(BOUNDS))))  # fmt: skip


def sample_range(contract: Contract, profile: Profile) -> Range:
    """Return the geometries that the base inputs of a profile stand for, whatever its slots allow; raises as `range_of`."""
    base = {entry.name for entry in contract.inputs}
    return range_of(contract, Profile(tuple(bounds for bounds in profile.inputs if bounds.name in base)))


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """Return the number of the profile that accepts these shapes and whose opt is nearest to them, or None."""

    def measure_distance(number: int) -> int:
        pairs = [(bounds.opt, shapes[bounds.name]) for bounds in profiles[number].inputs if bounds.name in shapes]
        return sum(abs(usual - size) for opt, shape in pairs for usual, size in zip(opt, shape, strict=True))

    fitting = [number for number, profile in enumerate(profiles) if profile.allows(shapes)]
    return min(fitting, key=measure_distance, default=None)


def explain_refusal(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Return why no profile accepts these shapes, input by input of the nearest profile; empty if one does."""
    if not profiles:
        return ("there is no profile",)
    if choose_profile(profiles, shapes) is not None:
        return ()
    pairs = [[(bounds, shapes[bounds.name]) for bounds in profile.inputs if bounds.name in shapes] for profile in profiles]
    excess = [max((_measure_excess(bounds, shape) for bounds, shape in inputs), default=0) for inputs in pairs]
    nearest = excess.index(min(excess))
    return tuple(
        f"{bounds.name}: got {show(shape)}, profile {nearest} {_describe_limit(bounds, shape)}"
        for bounds, shape in pairs[nearest]
        if not bounds.allows(shape)
    )


def _describe_limit(bounds: Bounds, shape: Shape) -> str:
    if bounds.min == bounds.max or len(shape) != len(bounds.min):
        return f"accepts {bounds}"
    if all(size <= most for size, most in zip(shape, bounds.max, strict=True)):
        return f"needs at least {show(bounds.min)}"
    if all(size >= least for size, least in zip(shape, bounds.min, strict=True)):
        return f"allows up to {show(bounds.max)}"
    return f"accepts {show(bounds.min)} to {show(bounds.max)}"


def _measure_excess(bounds: Bounds, shape: Shape) -> float:
    """Return the largest ratio of a size to the bound that it breaks; infinity for another rank."""
    if len(shape) != len(bounds.min):
        return math.inf
    sides = zip(bounds.min, shape, bounds.max, strict=True)
    return max((max(least / max(size, 1), size / most) for least, size, most in sides), default=0)


def find_profile_mismatches(contract: Contract, profile: Profile) -> tuple[Mismatch, ...]:
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
    repeated = [(name, times) for name, times in count.items() if times > 1 and name in rules]
    mismatches += [Mismatch("surplus", name, f"{times} times in the profile", "once") for name, times in repeated]
    try:
        sizes = range_of(contract, profile)
        for geometry in sizes.geometries:
            contract.require(geometry)
    except ShapecheckError as error:
        return (*mismatches, Mismatch("sizes", "the profile", str(error), "a range the model accepts"))
    known = [bounds for bounds in profile.inputs if bounds.name in rules]
    mismatches += filter(None, (compare_bounds(contract, bounds, rules[bounds.name], sizes) for bounds in known))
    order = {name: place for place, name in enumerate(rules)}
    return tuple(sorted(mismatches, key=lambda mismatch: order.get(mismatch.where, len(order))))


def verify_profiles(contract: Contract, profiles: Sequence[Profile]) -> None:
    """Raise ContractError with everything that is wrong with these profiles, or return in silence."""
    if not profiles:
        raise ShapecheckError("no profile was given; an engine with dynamic inputs needs one")
    mismatches = [mismatch for profile in profiles for mismatch in find_profile_mismatches(contract, profile)]
    if mismatches:
        raise ContractError(tuple(mismatches), subject="the profile does not fit the contract", contract=contract)


def compare_bounds(contract: Contract, bounds: Bounds, rule: tuple[Dim, ...], sizes: Range) -> Mismatch | None:
    """Return the first of max, min and opt of an input that is not the image of its geometry, or None."""
    for bound in ("max", "min", "opt"):
        geometry, shape = getattr(sizes, bound), getattr(bounds, bound)
        expected = geometry.shape_of(rule)
        if shape != expected:
            slots = contract.residuals if contract.role == "unet" else ()
            mismatches = compare_shapes(slots, geometry, {bounds.name: shape}, inputs=contract.inputs)
            wrong = next(mismatch for mismatch in mismatches if mismatch.where == bounds.name)
            # The axes of a base input are no cause.
            cause = wrong.cause if any(slot.name == bounds.name for slot in slots) else ""
            return replace(wrong, observed=f"{bound} {show(shape)}", expected=f"{bound} {show(expected)}", cause=cause)
    return None
