"""Optimization profiles: (min, opt, max) of every dynamic input, each the image of one geometry under the contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import Dim, Shape, show
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import AXES, USUAL_TOKENS, Geometry

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
        """Min, opt, max."""
        return self.min, self.opt, self.max

    def allows(self, shape: Shape) -> bool:
        """Whether a tensor of that shape may be given."""
        if len(shape) != len(self.min):
            return False
        return all(least <= size <= most for least, size, most in zip(self.min, shape, self.max, strict=True))

    def __str__(self) -> str:
        return " … ".join(dict.fromkeys(map(show, self.shapes)))


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimization profile: the bounds of every dynamic input, in the contract's order."""

    inputs: tuple[Bounds, ...]

    def bounds(self, name: str) -> Bounds | None:
        """Those of one input; None where it is not in the profile."""
        return next((each for each in self.inputs if each.name == name), None)

    def allows(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether these shapes may be given together; inputs that are not in the profile do not count."""
        return all(each.allows(shapes[each.name]) for each in self.inputs if each.name in shapes)

    def renamed(self, names: Mapping[str, str]) -> Profile:
        """With inputs called as `names` has it: from the contract's names to a file's, or back."""
        return Profile(tuple(replace(each, name=names.get(each.name, each.name)) for each in self.inputs))


@dataclass(frozen=True, slots=True)
class Range:
    """The geometries a profile is the image of."""

    min: Geometry
    opt: Geometry
    max: Geometry

    @property
    def geometries(self) -> tuple[Geometry, Geometry, Geometry]:
        """Min, opt, max."""
        return self.min, self.opt, self.max

    @property
    def is_static(self) -> bool:
        """Whether it is one size."""
        return self.min == self.opt == self.max

    def outside(self, geometry: Geometry) -> tuple[str, ...]:
        """In what a geometry is not between min and max; empty where it is."""
        found = []
        for axis in AXES.values():
            least, size, most = (getattr(each, axis) for each in (self.min, geometry, self.max))
            if not least <= size <= most:
                limits = f"{least} only" if least == most else f"{least} to {most}"
                found.append(f"{axis} {size}, where it takes {limits}")
        return tuple(found)

    def nearest(self, geometry: Geometry) -> Geometry:
        """The geometry between min and max that is nearest to another."""
        sides = ((axis, (getattr(each, axis) for each in (self.min, geometry, self.max))) for axis in AXES.values())
        return Geometry(**{axis: sorted(values)[1] for axis, values in sides})

    def with_(self, geometry: Geometry) -> Range:
        """The smallest range that holds another geometry too."""
        least = {axis: min(getattr(self.min, axis), getattr(geometry, axis)) for axis in AXES.values()}
        most = {axis: max(getattr(self.max, axis), getattr(geometry, axis)) for axis in AXES.values()}
        return Range(Geometry(**least), self.opt, Geometry(**most))

    def __str__(self) -> str:
        return " … ".join(dict.fromkeys(map(str, self.geometries)))


def profile_of(contract: Contract, sizes: Range) -> Profile:
    """The profile that serves every geometry from `sizes.min` to `sizes.max`, tuned for `sizes.opt`.

    One entry for each input with an axis that varies, slots of a UNet included. Raises ShapecheckError where the range is
    no range, or the model refuses one of its sizes, naming it.
    """
    _require_ordered(sizes)
    for bound, geometry in zip(BOUNDS, sizes.geometries, strict=True):
        if reason := _unserved(contract, geometry):
            factor = contract.header.vae_factor
            raise ShapecheckError(f"{bound}, {geometry.width * factor}x{geometry.height * factor} pixels: {reason}")
    dtypes = contract.input_dtypes
    return Profile(
        tuple(
            Bounds(name, dtypes[name], *(geometry.shape_of(rule) for geometry in sizes.geometries))
            for name, rule in contract.input_rules.items()
            if any(dim.symbol is not None for dim in rule)
        )
    )


def range_of(contract: Contract, profile: Profile) -> Range:
    """The geometries a profile is the image of, as most of its inputs have them.

    Raises ShapecheckError where no input shows one of the sizes, or a size is none.
    """
    votes = {axis: [Counter[int]() for _ in BOUNDS] for axis in AXES.values()}
    for name, rule in contract.input_rules.items():
        if (bounds := profile.bounds(name)) is not None and len(bounds.min) == len(rule):
            for axis, dim in enumerate(rule):
                if dim.symbol is not None and dim == Dim(dim.symbol):
                    for vote, shape in zip(votes[AXES[dim.symbol]], bounds.shapes, strict=True):
                        vote[shape[axis]] += 1
    usual = {"tokens": USUAL_TOKENS}
    if unseen := [axis for axis, counts in votes.items() if not counts[0] and axis not in usual]:
        raise ShapecheckError(f"no input of the profile shows the {' and the '.join(unseen)}: is `sample` in it?")
    return Range(*(Geometry(**usual | {f: counts[at].most_common(1)[0][0] for f, counts in votes.items() if counts[at]})
                   for at in range(len(BOUNDS))))  # fmt: skip


def choose(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """Which profile takes these shapes: of several, the one tuned for the size nearest to them. None where none does."""
    fitting = [number for number, profile in enumerate(profiles) if profile.allows(shapes)]
    return min(fitting, key=lambda number: _distance(profiles[number], shapes), default=None)


def refusals(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Why no profile takes these shapes, told of the profile that comes nearest; empty where one does."""
    if not profiles or choose(profiles, shapes) is not None:
        return () if profiles else ("there is no profile",)
    nearest = min(range(len(profiles)), key=lambda number: _excess(profiles[number], shapes))
    return tuple(_refused(nearest, profiles[nearest], shapes))


def _refused(number: int, profile: Profile, shapes: Mapping[str, Shape]) -> Iterator[str]:
    for each in profile.inputs:
        shape = shapes.get(each.name)
        if shape is not None and not each.allows(shape):
            yield f"{each.name}: {show(shape)} given, profile {number} {_limit(each, shape)}"


def _limit(bounds: Bounds, shape: Shape) -> str:
    if bounds.min == bounds.max or len(shape) != len(bounds.min):
        return f"takes {bounds}"
    if all(size <= most for size, most in zip(shape, bounds.max, strict=True)):
        return f"needs at least {show(bounds.min)}"
    if all(size >= least for size, least in zip(shape, bounds.min, strict=True)):
        return f"allows up to {show(bounds.max)}"
    return f"takes {show(bounds.min)} to {show(bounds.max)}"


def _excess(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    """How far outside of a profile these shapes lie: the largest ratio of a size to the bound it breaks."""
    return max((_overshoot(each, shapes[each.name]) for each in profile.inputs if each.name in shapes), default=0)


def _overshoot(bounds: Bounds, shape: Shape) -> float:
    if len(shape) != len(bounds.min):
        return float("inf")
    sides = zip(bounds.min, shape, bounds.max, strict=True)
    return max((max(least / max(size, 1), size / most) for least, size, most in sides), default=0)


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> int:
    pairs = [(each.opt, shapes[each.name]) for each in profile.inputs if each.name in shapes]
    return sum(abs(usual - size) for opt, shape in pairs for usual, size in zip(opt, shape, strict=True))


def _unserved(contract: Contract, geometry: Geometry) -> str:
    """Why the model cannot run at a geometry; empty where it can."""
    try:
        shapes = contract.input_shapes(geometry)
    except ShapecheckError as error:
        return str(error)
    return next((f"{name} would be {show(shape)}: too small to halve" for name, shape in shapes.items() if 0 in shape), "")


def _require_ordered(sizes: Range) -> None:
    for axis in AXES.values():
        least, usual, most = (getattr(each, axis) for each in sizes.geometries)
        if not least <= usual <= most:
            raise ShapecheckError(
                f"no range: the {axis} goes {least}, {usual}, {most}; give the smallest size, then the usual, then the largest"
            )
