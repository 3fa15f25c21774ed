"""A sweep of sizes: at which of them a graph works, and what its skips measure there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import Dim, Geometry, Shape, show
from shapecheck.contract.dims import BATCH, constant
from shapecheck.observe import sizes
from shapecheck.onnx.input_roles import Roles
from shapecheck.onnx.reading import Reading
from shapecheck.onnx.shapes import Shapes
from shapecheck.progress import Progress

_HALVINGS = 3


@dataclass(frozen=True, slots=True)
class SizeSweep:
    """The shapes seen at each size, and the sizes that work."""

    runs: Mapping[Geometry, Shapes]
    divisor: int
    """The graph works at multiples of this; 0 if it worked at no size that was tried."""
    fixed: Mapping[str, int]
    """Sizes of a call that the file declares as plain numbers: of batch, h, w, tokens."""
    refused: Geometry | None
    """The first size at which it fails."""
    refused_batch: Geometry | None
    """A batch and number of tokens at which it fails, although another works."""

    def working(self, requested: Geometry | None, divisor: int) -> dict[Geometry, Shapes]:
        """Return what was seen at the multiples of `divisor` that work; at the requested size alone, if there is one."""
        tried = self.runs if requested is None else {requested.with_sizes(self.fixed)} & self.runs.keys()
        allowed = [geometry for geometry in tried if not (geometry.height % divisor or geometry.width % divisor)]
        return {geometry: self.runs[geometry] for geometry in allowed if not self.runs[geometry].fault}

    def fault(self, geometry: Geometry | None) -> str:
        """Return why the graph fails at a size; nothing if it works, or was not tried."""
        run = None if geometry is None else self.runs.get(geometry)
        return run.fault if run else ""

    def measured(self, skip: str) -> dict[Geometry, Shape]:
        """Return the shapes of a skip, (batch, channels, height, width), wherever they were seen."""
        shapes = {geometry: run.known.get(skip, ()) for geometry, run in self.runs.items()}
        return {geometry: shape for geometry, shape in shapes.items() if len(shape) == 4}

    def rules(self, skips: Iterable[str]) -> dict[str, tuple[Dim, ...]]:
        """Return the skips' shapes as rules, from what they measured; without those that no chain of halvings explains."""
        tables = {skip: table for skip in skips if (table := self.measured(skip))}
        common = [geometry for geometry in self.runs if all(geometry in table for table in tables.values())]
        rules = {skip: [BATCH, constant(next(iter(table.values()))[1])] for skip, table in tables.items() if common}
        for symbol, axis in (("h", 2), ("w", 3)):
            columns = {skip: tuple(tables[skip][geometry][axis] for geometry in common) for skip in rules}
            known = sizes.derive_rules(symbol, tuple(geometry.sizes[symbol] for geometry in common), columns.values())
            rules = {skip: [*rule, known[columns[skip]]] for skip, rule in rules.items() if columns[skip] in known}
        return {skip: tuple(rule) for skip, rule in rules.items()}


def sweep_sizes(
    reading: Reading, roles: Roles, requested: Geometry | None, progress: Progress, *, allowed: int = 1
) -> SizeSweep:
    """Try a graph at odd sizes; if it fails there, at multiples of 2, 4, … until it works.

    Multiples of `allowed` are among the sizes that are tried.
    """
    runs: dict[Geometry, Shapes] = {}
    fixed = {
        symbol: dim
        for tensor in roles.base
        if tensor == roles.sample or tensor.name == "encoder_hidden_states"
        for symbol, dim in zip(roles.symbols(tensor), tensor.dims or (), strict=True)
        if symbol is not None and isinstance(dim, int)
    }

    def find_refusal(geometries: Iterable[Geometry]) -> Geometry | None:
        """Return the first of these sizes, as far as the file leaves them open, at which the graph fails."""
        for geometry in dict.fromkeys(geometry.with_sizes(fixed) for geometry in geometries):
            if geometry not in runs:
                progress(f"following the shapes at {geometry}")
                runs[geometry] = _try_size(reading, roles, geometry)
            if runs[geometry].fault:
                return geometry
        return None

    refused = find_refusal(sizes.list_survey_sizes(_HALVINGS))
    divisor, failed = 1, refused
    while failed and divisor < 64 and not {"h", "w"} <= fixed.keys():
        divisor *= 2
        failed = find_refusal(sizes.list_multiples(divisor, _HALVINGS))
    if divisor < allowed and not failed:
        failed = find_refusal(sizes.list_multiples(allowed, _HALVINGS))
    works = next((geometry for geometry, run in runs.items() if not run.fault), None)
    # Another batch and number of tokens than all the sizes above have.
    refused_batch = works and find_refusal([replace(works, batch=3, tokens=11)])
    if requested is not None:
        find_refusal([requested])
    return SizeSweep(runs, 0 if failed else divisor, fixed, refused, refused_batch)


def _try_size(reading: Reading, roles: Roles, geometry: Geometry) -> Shapes:
    """Return the shapes if residuals are as large as their skips.

    A residual of one cell fits every skip, so that what it should measure is seen in the skip. If the graph reads sizes off
    residuals, they get the sizes that were seen, until these are the sizes they had.
    """
    shapes: dict[str, Sequence[int | None]] = {tensor.name: (1, 1, 1, 1) for tensor in roles.added}
    for tensor in roles.base:
        if tensor.dims is not None:
            axes = zip(tensor.dims, roles.symbols(tensor), strict=True)
            shapes[tensor.name] = [_measure(dim, symbol, geometry) for dim, symbol in axes]
    measured = [tensor for tensor in roles.added if tensor.measured and tensor.adds]
    run = reading.at(shapes)
    for _ in measured:
        seen = {tensor.name: run.known.get(tensor.adds[0].skip, shapes[tensor.name]) for tensor in measured}
        if seen.items() <= shapes.items():
            break
        shapes |= seen
        run = reading.at(shapes)

    image = None if run.fault or roles.is_controlnet else reading.image
    shape = run.known.get(image.name, ()) if image else ()
    if image and len(shape) == 4 and shape[2:] != (geometry.height, geometry.width):
        sample = f"a sample of {geometry.height}×{geometry.width}"
        return Shapes(run.known, f"output {image.name}: is {show(shape[2:])} for {sample}")
    return run


def _measure(dim: int | str | None, symbol: str | None, geometry: Geometry) -> int | None:
    """Return the size of a declared axis, or None if neither its symbol nor its name tells it."""
    if isinstance(dim, int):
        return dim
    try:
        return geometry.sizes[symbol] if symbol else Dim.parse(dim or "").at(geometry.sizes)
    except (ValueError, KeyError):
        return None
