"""The graph of an ONNX file, or TensorRT's parse of it, against the contract, a profile and a range of sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shapecheck.contract import Contract, Dim, Geometry, Mismatch, show
from shapecheck.contract.mismatch import Port
from shapecheck.progress import Progress, silent
from shapecheck.report.numbers import format_pixels
from shapecheck.tensorrt.profiles import Profile, Range

if TYPE_CHECKING:
    from shapecheck.onnx.reading import Reading

_MOST_ELEMENTS = 2**40
"""In one tensor; by the message of TensorRT for RTX 1.7.1, which builds for more all the same."""
_ADVICE = "`shapecheck export` writes graphs that work at every size; this one may do for one size alone"


def compare_graph(contract: Contract, ports: Sequence[Port], names: Mapping[str, str]) -> tuple[Mismatch, ...]:
    """Return everything in which the inputs are not the contract's: names, ranks, channels, dtypes, names of dimensions.

    An axis that the contract leaves open may be fixed; its profile must then say the same number.
    """
    mismatches = [*contract.compare_inputs(ports, names)]
    table = {port.name: port for port in ports}
    # TensorRT requires that dimensions with the same name have the same size.
    stands_for: dict[str, Dim] = {}
    for name, rule in contract.input_rules.items():
        port = table.get(names[name])
        if port is None or port.dims is None or len(port.dims) != len(rule):
            continue
        for own, dim in zip(port.dims, rule, strict=True):
            if isinstance(own, str) and dim.symbol is not None and stands_for.setdefault(own, dim) != dim:
                cause = f"{own} is {stands_for[own]} elsewhere, and TensorRT holds equal names to be equal sizes"
                mismatches.append(Mismatch("symbol", name, f"an axis named {own}", str(dim), cause=cause))
    return tuple(mismatches)


def compare_profile(profile: Profile, ports: Sequence[Port], names: Mapping[str, str]) -> tuple[Mismatch, ...]:
    """Return why a profile, in the contract's names, cannot serve inputs that fix an axis or have another dtype."""
    table = {port.name: port for port in ports}
    mismatches = []
    for bounds in profile.inputs:
        port = table.get(names.get(bounds.name, bounds.name))
        if port is None or port.dims is None or {len(shape) for shape in bounds.shapes} != {len(port.dims)}:
            continue
        if bounds.dtype != port.dtype:
            cause = f"the profile was made for {bounds.dtype}; precision is the dtype of the graph"
            mismatches.append(Mismatch("dtype", bounds.name, bounds.dtype, port.dtype, cause=cause))
        sides = zip(port.dims, *bounds.shapes, strict=True)
        if any(isinstance(own, int) and {own} != set(sizes) for own, *sizes in sides):
            mismatches.append(Mismatch("sizes", bounds.name, str(bounds), str(port), cause="the graph fixes this axis"))
    return tuple(mismatches)


def try_sizes(
    reading: Reading, contract: Contract, names: Mapping[str, str], sizes: Range, progress: Progress = silent
) -> Mismatch | None:
    """Follow the graph without weights at sizes of the range; return the first that it cannot work at and why, or None."""
    geometries = list(dict.fromkeys(_list_trials(contract, sizes)))
    for number, geometry in enumerate(geometries):
        progress(f"trying the graph at {geometry} ({number + 1} of {len(geometries)})")
        shapes = reading.at({names[name]: shape for name, shape in contract.input_shapes(geometry).items()})
        large = (f"{name} would be {show(shape)}" for name, shape in shapes.known.items() if math.prod(shape) > _MOST_ELEMENTS)
        fault = shapes.fault or next((f"{tensor}, more than TensorRT's limit of 2^40 elements" for tensor in large), "")
        if fault:
            actual = f"cannot work at {format_pixels(geometry, contract.header.vae_factor)} pixels"
            return Mismatch("sizes", "the graph", actual, "works", geometry, cause=f"{fault}; {_ADVICE}")
    return None


def _list_trials(contract: Contract, sizes: Range) -> Iterator[Geometry]:
    """Yield the ends, the middle, both long corners, then sizes between that no halving divides evenly."""
    yield from sizes.geometries
    yield replace(sizes.max, height=sizes.min.height)
    yield replace(sizes.max, width=sizes.min.width)
    # Of height and width modulo 8: odd at the first, second or third halving, or before none of them.
    for residues in ((1, 3), (3, 7), (7, 1), (4, 6)):
        height = _find_side(sizes.min.height, sizes.max.height, residues[0], contract.divisor)
        width = _find_side(sizes.min.width, sizes.max.width, residues[1], contract.divisor)
        yield replace(sizes.opt, height=height or sizes.opt.height, width=width or sizes.opt.width)


def _find_side(least: int, most: int, residue: int, divisor: int) -> int | None:
    """Return a size in the range that leaves that rest modulo 8, counted in cells of the divisor, or None."""
    cells = range(-(-least // divisor), most // divisor + 1)
    return next((cell * divisor for cell in cells if cell % 8 == residue), None)
