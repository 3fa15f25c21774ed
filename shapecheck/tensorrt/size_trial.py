"""Whether a graph works at every size of a range: tried at its ends, its middle and odd sizes between, without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from shapecheck.contract import Contract, Geometry, Mismatch, show
from shapecheck.onnx.reading import Reading
from shapecheck.onnx.shapes import Shapes
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.profiles import Range

_MOST_ELEMENTS = 2**40
"""In one tensor; by the message of TensorRT for RTX 1.7.1, which builds for more all the same."""


_ADVICE = "`shapecheck export` writes graphs that work at every size; one size alone may do with this one"


_RESIDUES = ((1, 3), (3, 7), (7, 1), (4, 6))
"""Of height and width modulo 8: odd at the first, second or third halving, or before none of them."""


def refusal(
    reading: Reading, contract: Contract, names: Mapping[str, str], sizes: Range, progress: Progress = silent
) -> Mismatch | None:
    """The first size of the range at which the graph cannot work, and why; None where it works at all that were tried."""
    tried = list(dict.fromkeys(_trials(contract, sizes)))
    for number, geometry in enumerate(tried):
        progress(f"trying the graph at {geometry} ({number + 1} of {len(tried)})")
        shapes = contract.input_shapes(geometry)
        found = reading.at({names[name]: shape for name, shape in shapes.items()})
        fault = found.fault or _too_large(found)
        if fault:
            return Mismatch(
                "sizes",
                "the graph",
                f"cannot work at {_told(contract, geometry)}",
                "works",
                geometry,
                cause=f"{fault}; {_ADVICE}",
            )
    return None


def _too_large(found: Shapes) -> str:
    """The first tensor of more elements than TensorRT takes; empty where there is none."""
    large = (f"{name} would be {show(shape)}" for name, shape in found.known.items() if math.prod(shape) > _MOST_ELEMENTS)
    return next((f"{told}, more than the 2^40 elements that TensorRT takes" for told in large), "")


def _trials(contract: Contract, sizes: Range) -> Iterator[Geometry]:
    """The ends, the middle, both long corners, then sizes between that no halving divides evenly."""
    yield from sizes.geometries
    yield replace(sizes.max, height=sizes.min.height)
    yield replace(sizes.max, width=sizes.min.width)
    for residues in _RESIDUES:
        height = _inside(sizes.min.height, sizes.max.height, residues[0], contract.divisor)
        width = _inside(sizes.min.width, sizes.max.width, residues[1], contract.divisor)
        yield replace(sizes.opt, height=height or sizes.opt.height, width=width or sizes.opt.width)


def _inside(least: int, most: int, residue: int, divisor: int) -> int | None:
    """A size in the range that leaves that rest modulo 8, counted in cells of the divisor; None where there is none."""
    cells = range(-(-least // divisor), most // divisor + 1)
    return next((cell * divisor for cell in cells if cell % 8 == residue), None)


def _told(contract: Contract, geometry: Geometry) -> str:
    factor = contract.header.vae_factor
    return f"{geometry.width * factor}×{geometry.height * factor} pixels"
