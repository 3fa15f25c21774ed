"""Comparison of shapes with slots, and of declared inputs with a contract's: every disagreement at once."""

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
    dims: tuple[int | str | Dim | None, ...] | None = None
    """A number, a name or a rule for each axis, None if it is dynamic and nameless; None for all if no shape is known."""

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
    """Return every mismatch between declared inputs and those of a contract, in its order, surplus inputs last.

    Names, ranks, channels and the given dtypes count. An axis that the contract leaves open may be fixed or have any name;
    one that is declared as a rule has to be the same rule. `names` are the names of the inputs in the declaration. `absent`
    and `present` describe a missing input, with its `cause`, and a surplus one; without `present` its shape does. An input
    that is declared twice is compared twice.
    """
    names, producers = names or {}, producers or {}
    ports: dict[str, list[Port]] = {}
    for port in declared:
        ports.setdefault(port.name, []).append(port)
    mismatches = []
    for name, rule in rules.items():
        declared_name, module = names.get(name, name), producers.get(name, "")
        if declared_name not in ports:
            observed = absent if declared_name == name else f"{absent} (looked for {declared_name})"
            mismatches.append(Mismatch("missing", name, observed, show(rule), unet_module=module, cause=cause))
        for port in ports.pop(declared_name, ()):
            if kind := _classify_declared(rule, port.dims):
                mismatches.append(Mismatch(kind, name, str(port), show(rule), unet_module=module))
            if kind != "rank" and name in dtypes and port.dtype != dtypes[name]:
                mismatches.append(Mismatch("dtype", name, port.dtype, dtypes[name], unet_module=module))
    surplus = ((name, present or str(port)) for name, (port, *_) in ports.items())
    return (*mismatches, *(Mismatch("surplus", name, observed, "no such input") for name, observed in surplus))


def compare_shapes(
    slots: Sequence[Slot],
    geometry: Geometry,
    actual: Mapping[str, Shape],
    *,
    makers: Mapping[str, str] | None = None,
    inputs: Sequence[Input] = (),
) -> tuple[Mismatch, ...]:
    """Return every mismatch between shapes and slots: base inputs, if any, then slots in order, surplus shapes last.

    `actual` maps names to shapes, those of slots (batch, channels, height, width), height and width in slot cells.
    `makers` maps the same names to the paths of the modules that made the residuals, for the report.
    """
    table = {slot.name: slot.shape_at(geometry) for slot in slots}
    makers, mismatches = makers or {}, []
    for entry in inputs:
        expected, shape = entry.shape_at(geometry), actual.get(entry.name)
        if shape is None:
            mismatches.append(Mismatch("missing", entry.name, "nothing", expected, geometry))
        elif shape != expected:
            kind = _classify_input(entry.shape, shape, expected)
            mismatches.append(Mismatch(kind, entry.name, shape, expected, geometry, cause=describe_axes(entry.shape)))
    for slot in slots:
        expected, shape = table[slot.name], actual.get(slot.name)
        if shape is None:
            mismatches.append(Mismatch("missing", slot.name, "nothing", expected, geometry, slot.producer))
        elif shape != expected:
            kind, cause = _diagnose_slot(expected, shape, table)
            maker = makers.get(slot.name, "")
            mismatches.append(Mismatch(kind, slot.name, shape, expected, geometry, slot.producer, maker, cause))
    known, ignored = {*table, *(entry.name for entry in inputs)}, "the UNet ignores it in silence"
    for name, shape in actual.items():
        if name not in known:
            mismatches.append(Mismatch("surplus", name, shape, "no such slot", geometry, "", makers.get(name, ""), ignored))
    return tuple(mismatches)


def describe_axes(rule: tuple[Dim, ...]) -> str:
    """Return the words for the axes of a shape."""
    return f"its axes are ({', '.join(map(str, rule))})"


def _classify_input(rule: tuple[Dim, ...], shape: Shape, expected: Shape) -> MismatchKind:
    if len(shape) != len(expected):
        return "rank"
    wrong = {dim.symbol for dim, actual, size in zip(rule, shape, expected, strict=True) if actual != size}
    if None in wrong:
        return "channels"
    return "batch" if wrong == {"batch"} else "size"


def _classify_declared(rule: tuple[Dim, ...], dims: Sequence[int | str | Dim | None] | None) -> MismatchKind | None:
    if dims is None:
        return None
    if len(dims) != len(rule):
        return "rank"
    axes = tuple(zip(dims, rule, strict=True))
    if any(dim.symbol is None and own not in (dim, dim.scale) for own, dim in axes):
        return "channels" if len(rule) == 4 else "input"
    return "input" if any(isinstance(own, Dim) and own != dim for own, dim in axes) else None


def _diagnose_slot(expected: Shape, actual: Shape, table: Mapping[str, Shape]) -> tuple[MismatchKind, str]:
    """Return the kind of a disagreement in one slot, and its cause by comparison with the other slots."""
    if len(actual) != len(expected):
        return "rank", f"{len(actual)} axes where (batch, channels, height, width) are needed"
    owners = [name for name, shape in table.items() if shape == actual]
    more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
    owner = f"this is the shape of {owners[0]}{more}" if owners else ""
    if actual[1] != expected[1]:
        return "channels", owner
    if actual[0] != expected[0]:
        return "batch", "PyTorch broadcasts a batch of 1 in silence" if actual[0] == 1 else ""
    if actual[2:] == expected[2:][::-1]:
        return "size", "height and width are exchanged"
    if actual[2:] == (1, 1):
        return "broadcast", "1×1 is broadcast in silence; only pooled slots may do that"
    if all(abs(got - size) <= 1 for got, size in zip(actual[2:], expected[2:], strict=True)):
        return "rounding", "off by one: the sizes were halved with another rounding than the UNet's"
    return "size", owner
