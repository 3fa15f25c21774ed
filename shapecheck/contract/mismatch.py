"""Given shapes against the slots that take them, and declared inputs against a contract's: every disagreement at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shapecheck.contract.dims import Dim, Shape, show
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.records import Input, Mismatch, MismatchKind, Slot


@dataclass(frozen=True, slots=True)
class Port:
    """One input that a file, a network, an engine or another contract declares."""

    name: str
    dtype: str = ""
    """Empty where it does not count."""
    dims: tuple[int | str | Dim | None, ...] | None = None
    """A number, a name or a rule for each axis, None where it is dynamic and nameless; without axes where none are known."""

    def __str__(self) -> str:
        if self.dims is None:
            return "no shape"
        return "×".join("?" if dim is None else str(dim) for dim in self.dims) or "scalar"


def compare_inputs(
    rules: Mapping[str, tuple[Dim, ...]],
    dtypes: Mapping[str, str],
    declared: Iterable[Port],
    *,
    names: Mapping[str, str] | None = None,
    producers: Mapping[str, str] | None = None,
    absent: str = "no such input",
    present: str = "",
    cause: str = "",
) -> tuple[Mismatch, ...]:
    """Return everything in which declared inputs are not those of a contract, in its order, surplus inputs last.

    Names, ranks, channels and dtypes count. An axis that the contract leaves open may be fixed or have any name; one that is
    declared as a rule has to be the same rule. `names` says what the inputs are called where they are declared. `absent` and
    `present` are the words for one that is missing, with its `cause`, and for one too many; without them its shape is told.
    """
    names, producers, table = names or {}, producers or {}, {port.name: port for port in declared}
    found = []
    for name, rule in rules.items():
        port, module = table.pop(names.get(name, name), None), producers.get(name, "")
        if port is None:
            found.append(Mismatch("missing", name, absent, show(rule), unet_module=module, cause=cause))
            continue
        if kind := _declared_kind(rule, port.dims):
            found.append(Mismatch(kind, name, str(port), show(rule), unet_module=module))
        if kind != "rank" and port.dtype and port.dtype != dtypes[name]:
            found.append(Mismatch("dtype", name, port.dtype, dtypes[name], unet_module=module))
    return (*found, *(Mismatch("surplus", port.name, present or str(port), "no such input") for port in table.values()))


def compare_shapes(
    slots: Sequence[Slot],
    geometry: Geometry,
    given: Mapping[str, Shape],
    *,
    makers: Mapping[str, str] | None = None,
    inputs: Sequence[Input] = (),
) -> tuple[Mismatch, ...]:
    """Return what is wrong when these residuals meet these slots: base inputs, if any, then slots in order, surplus ones last.

    `given` maps names to shapes, those of slots (batch, channels, height, width), height and width in slot cells.
    `makers` maps the same names to the paths of the modules that made the residuals, for the report.
    """
    table = {slot.name: slot.shape_at(geometry) for slot in slots}
    makers, found = makers or {}, []
    for base in inputs:
        expected, shape = base.shape_at(geometry), given.get(base.name)
        if shape is None:
            found.append(Mismatch("missing", base.name, "nothing", expected, geometry))
        elif shape != expected:
            kind = _kind_of(base.shape, shape, expected)
            found.append(Mismatch(kind, base.name, shape, expected, geometry, cause=describe_axes(base.shape)))
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
        if name not in table and all(name != base.name for base in inputs)
    ]
    return (*found, *surplus)


def describe_axes(rule: tuple[Dim, ...]) -> str:
    """Return the words for the axes of a shape."""
    return f"its axes are ({', '.join(map(str, rule))})"


def _kind_of(rule: tuple[Dim, ...], shape: Shape, expected: Shape) -> MismatchKind:
    """In what the shape of an input is not what its rule gives."""
    if len(shape) != len(expected):
        return "rank"
    wrong = {dim.symbol for dim, size, wanted in zip(rule, shape, expected, strict=True) if size != wanted}
    if None in wrong:
        return "channels"
    return "batch" if wrong == {"batch"} else "size"


def _declared_kind(rule: tuple[Dim, ...], dims: Sequence[int | str | Dim | None] | None) -> MismatchKind | None:
    """Return in what declared axes are not those of a rule, or None."""
    if dims is None:
        return None
    if len(dims) != len(rule):
        return "rank"
    axes = tuple(zip(dims, rule, strict=True))
    if any(dim.symbol is None and own not in (dim, dim.scale) for own, dim in axes):
        return "channels" if len(rule) == 4 else "input"
    return "input" if any(isinstance(own, Dim) and own != dim for own, dim in axes) else None


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
