"""The inputs of a graph or network, whoever read them, against the contract and against the profiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shapecheck.contract import Contract, Dim, Mismatch, ShapecheckError
from shapecheck.contract.mismatch import Port
from shapecheck.onnx.reading import GraphTensor
from shapecheck.tensorrt.profiles import Profile


def ports_of(tensors: Iterable[GraphTensor]) -> tuple[Port, ...]:
    """What an ONNX file declares. Raises ShapecheckError where an input has no shape."""
    tensors = tuple(tensors)
    if shapeless := [each.name for each in tensors if each.dims is None]:
        raise ShapecheckError(f"no shape is declared for {', '.join(shapeless)}: TensorRT needs the rank of every input")
    return tuple(Port(each.name, each.dtype, each.dims) for each in tensors)


def mismatches(contract: Contract, ports: Sequence[Port], names: Mapping[str, str]) -> tuple[Mismatch, ...]:
    """Everything in which the inputs are not the contract's: names, ranks, channels, dtypes, names of dimensions.

    An axis that the contract leaves open may be fixed; its profile must then say the same number.
    """
    table = {port.name: port for port in ports}
    return (*contract.compare_inputs(ports, names), *_shared_symbols(contract.input_rules, table, names))


def profile_mismatches(profile: Profile, ports: Sequence[Port], names: Mapping[str, str]) -> tuple[Mismatch, ...]:
    """What keeps a profile, in the contract's names, from serving inputs that fix an axis or have another dtype."""
    table = {port.name: port for port in ports}
    found = []
    for each in profile.inputs:
        port = table.get(names.get(each.name, each.name))
        if port is None or port.dims is None or len(port.dims) != len(each.min):
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
        if port is None or port.dims is None or len(port.dims) != len(rule):
            continue
        for own, dim in zip(port.dims, rule, strict=True):
            if isinstance(own, str) and dim.symbol is not None and stands_for.setdefault(own, dim) != dim:
                cause = f"{own} is {stands_for[own]} elsewhere, and TensorRT takes equal names for equal sizes"
                found.append(Mismatch("symbol", name, f"an axis named {own}", str(dim), cause=cause))
    return found
