"""The inputs of a graph or network, whoever read them, against the contract and against the profiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shapecheck.contract import Contract, Dim, Mismatch, ShapecheckError, show
from shapecheck.contract.contract import dtypes_of, rules_of
from shapecheck.onnx.reading import DeclaredDim, Tensor
from shapecheck.tensorrt.profiles import Profile


@dataclass(frozen=True, slots=True)
class Port:
    """One input: a number or a name for each axis, None where it is dynamic and nameless."""

    name: str
    dtype: str
    dims: tuple[DeclaredDim, ...]

    def __str__(self) -> str:
        return "×".join("?" if dim is None else str(dim) for dim in self.dims) or "scalar"


def ports_of(tensors: Iterable[Tensor]) -> tuple[Port, ...]:
    """What an ONNX file declares. Raises ShapecheckError where an input has no shape."""
    tensors = tuple(tensors)
    if shapeless := [each.name for each in tensors if each.dims is None]:
        raise ShapecheckError(f"no shape is declared for {', '.join(shapeless)}: TensorRT needs the rank of every input")
    return tuple(Port(each.name, each.dtype, each.dims or ()) for each in tensors)


def mismatches(contract: Contract, ports: Sequence[Port], names: Mapping[str, str]) -> tuple[Mismatch, ...]:
    """Everything in which the inputs are not the contract's: names, ranks, channels, dtypes, names of dimensions.

    An axis that the contract leaves open may be fixed; its profile must then say the same number.
    """
    table = {port.name: port for port in ports}
    rules, dtypes = rules_of(contract), dtypes_of(contract)
    producers = {slot.name: slot.producer for slot in contract.residuals}
    found = []
    for name, rule in rules.items():
        port, module = table.get(names[name]), producers.get(name, "")
        if port is None:
            found.append(Mismatch("missing", name, "no such input", show(rule), unet_module=module))
        elif len(port.dims) != len(rule):
            found.append(Mismatch("rank", name, str(port), show(rule), unet_module=module))
        else:
            if any(dim.symbol is None and own != dim.scale for own, dim in zip(port.dims, rule, strict=True)):
                found.append(Mismatch("channels", name, str(port), show(rule), unet_module=module))
            if port.dtype != dtypes[name]:
                found.append(Mismatch("dtype", name, port.dtype, dtypes[name], unet_module=module))
    known = set(names.values())
    surplus = [Mismatch("surplus", port.name, str(port), "no such input") for port in ports if port.name not in known]
    return (*found, *surplus, *_shared_symbols(rules, table, names))


def profile_mismatches(profile: Profile, ports: Sequence[Port], names: Mapping[str, str]) -> tuple[Mismatch, ...]:
    """What keeps a profile, in the contract's names, from serving inputs that fix an axis or have another dtype."""
    table = {port.name: port for port in ports}
    found = []
    for each in profile.inputs:
        port = table.get(names.get(each.name, each.name))
        if port is None or len(port.dims) != len(each.min):
            continue
        if each.dtype != port.dtype:
            cause = f"the profile was made for {each.dtype}; precision is the dtype of the graph"
            found.append(Mismatch("dtype", each.name, each.dtype, port.dtype, cause=cause))
        sides = zip(port.dims, *each.shapes, strict=True)
        if any(isinstance(own, int) and {own} != set(sizes) for own, *sizes in sides):
            found.append(Mismatch("sizes", each.name, str(each), str(port), cause="the graph fixes this axis"))
    return tuple(found)


def _shared_symbols(
    rules: Mapping[str, tuple[Dim, ...]], table: Mapping[str, Port], names: Mapping[str, str]
) -> list[Mismatch]:
    """Dimensions of different size under one name: TensorRT holds equal names to be equal sizes."""
    stands_for: dict[str, Dim] = {}
    found = []
    for name, rule in rules.items():
        port = table.get(names[name])
        if port is None or len(port.dims) != len(rule):
            continue
        for own, dim in zip(port.dims, rule, strict=True):
            if isinstance(own, str) and dim.symbol is not None and stands_for.setdefault(own, dim) != dim:
                cause = f"{own} is {stands_for[own]} elsewhere, and TensorRT takes equal names for equal sizes"
                found.append(Mismatch("symbol", name, f"an axis named {own}", str(dim), cause=cause))
    return found
