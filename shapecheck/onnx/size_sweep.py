"""At which sizes a graph works, and what its skips measure there: its shapes at the sizes every probe observes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import Dim, Geometry, Shape, show
from shapecheck.contract.dims import BATCH, constant
from shapecheck.observe import sizes
from shapecheck.onnx.input_roles import Roles
from shapecheck.onnx.reading import DeclaredDim, GraphTensor, Reading
from shapecheck.onnx.shapes import Shapes
from shapecheck.progress import Progress

_LARGEST_DIVISOR = 64


_HALVINGS = 3


_OTHER_BATCH, _OTHER_TOKENS = 3, 11


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen at each size."""

    runs: Mapping[Geometry, Shapes]
    divisor: int
    """The graph works at multiples of this; 0 where it worked at no size that was tried."""
    fixed: Mapping[str, int]
    """Sizes of a call that the file declares as plain numbers: of batch, h, w, tokens."""
    refused: Geometry | None
    """The first size at which it does not work."""
    refused_batch: Geometry | None
    """A batch and number of tokens at which it does not work, where another does."""

    def pinned(self, geometry: Geometry) -> Geometry:
        """The size with what the file fixes."""
        return geometry.with_sizes(self.fixed)

    def working(self, asked: Geometry | None, divisor: int) -> dict[Geometry, Shapes]:
        """What was seen where the graph works, at multiples of `divisor`; where one size is asked for, there alone."""
        counted = self.runs if asked is None else {self.pinned(asked)} & self.runs.keys()
        allowed = [each for each in counted if not (each.height % divisor or each.width % divisor)]
        return {each: self.runs[each] for each in allowed if not self.runs[each].fault}

    def fault(self, geometry: Geometry | None) -> str:
        """Why the graph does not work there; empty where it does, or where it was not tried."""
        run = None if geometry is None else self.runs.get(geometry)
        return run.fault if run else ""

    def measured(self, skip: str) -> dict[Geometry, Shape]:
        """The shapes of a skip, (batch, channels, height, width), wherever they were seen."""
        seen = {geometry: run.known.get(skip, ()) for geometry, run in self.runs.items()}
        return {geometry: shape for geometry, shape in seen.items() if len(shape) == 4}

    def rules(self, skips: Iterable[str]) -> dict[str, tuple[Dim, ...]]:
        """The skips' shapes as rules, from what they measured; without those that no chain of halvings explains."""
        tables = {skip: table for skip in skips if (table := self.measured(skip))}
        common = [geometry for geometry in self.runs if all(geometry in table for table in tables.values())]
        rules = {skip: [BATCH, constant(next(iter(table.values()))[1])] for skip, table in tables.items() if common}
        for symbol, axis in (("h", 2), ("w", 3)):
            columns = {skip: tuple(tables[skip][geometry][axis] for geometry in common) for skip in rules}
            known = sizes.rules(symbol, tuple(geometry.sizes[symbol] for geometry in common), columns.values())
            rules = {skip: [*rule, known[columns[skip]]] for skip, rule in rules.items() if columns[skip] in known}
        return {skip: tuple(rule) for skip, rule in rules.items()}


def survey(reading: Reading, roles: Roles, asked: Geometry | None, progress: Progress, *, allowed: int = 1) -> Survey:
    """Try a graph at odd sizes; where it fails there, at multiples of 2, 4, … until it works.

    Multiples of `allowed` are among the sizes that are tried.
    """
    trial = _Trial(reading, roles, progress)
    refused = trial.first_refusal(sizes.survey(_HALVINGS))
    divisor, failed = 1, refused
    while failed and divisor < _LARGEST_DIVISOR and not {"h", "w"} <= trial.fixed.keys():
        divisor *= 2
        failed = trial.first_refusal(sizes.multiples_of(divisor, _HALVINGS))
    if divisor < allowed and not failed:
        failed = trial.first_refusal(sizes.multiples_of(allowed, _HALVINGS))
    works = next((geometry for geometry, run in trial.runs.items() if not run.fault), None)
    other = works and trial.first_refusal([replace(works, batch=_OTHER_BATCH, tokens=_OTHER_TOKENS)])
    if asked is not None:
        trial.first_refusal([asked])
    return Survey(trial.runs, 0 if failed else divisor, trial.fixed, refused, other)


class _Trial:
    """One graph, tried at one size after another."""

    def __init__(self, reading: Reading, roles: Roles, progress: Progress) -> None:
        self._reading, self._roles, self._progress = reading, roles, progress
        self.runs: dict[Geometry, Shapes] = {}
        self.fixed = {
            symbol: dim
            for each in roles.base
            if each == roles.sample or each.name == "encoder_hidden_states"
            for symbol, dim in zip(roles.symbols(each), each.dims or (), strict=True)
            if symbol is not None and isinstance(dim, int)
        }

    def first_refusal(self, geometries: Sequence[Geometry]) -> Geometry | None:
        """The first of these sizes, as far as the file leaves them open, at which the graph does not work."""
        for geometry in dict.fromkeys(each.with_sizes(self.fixed) for each in geometries):
            if geometry not in self.runs:
                self._progress(f"following the shapes at {geometry}")
                run = self._run(geometry)
                self.runs[geometry] = replace(run, fault=run.fault or self._wrong_output(run, geometry))
            if self.runs[geometry].fault:
                return geometry
        return None

    def _run(self, geometry: Geometry) -> Shapes:
        """The shapes where residuals are as large as their skips.

        A residual of one cell fits every skip, so that what it should measure is seen in the skip. Where the graph reads
        sizes off residuals, they are given what was seen, until that is what they were given.
        """
        given = {each.name: self._given(each, geometry) for each in self._roles.base if each.dims is not None}
        given |= {each.name: (1, 1, 1, 1) for each in self._roles.added}
        measured = [each for each in self._roles.added if each.measured and each.adds]
        run = self._reading.at(given)
        for _ in measured:
            seen = {each.name: run.known.get(each.adds[0].skip, given[each.name]) for each in measured}
            if seen.items() <= given.items():
                break
            given |= seen
            run = self._reading.at(given)
        return run

    def _given(self, each: GraphTensor, geometry: Geometry) -> Sequence[int | None]:
        """What a base input measures at this size, as far as its declared shape tells."""
        return [_size(*axis, geometry) for axis in zip(each.dims or (), self._roles.symbols(each), strict=True)]

    def _wrong_output(self, run: Shapes, geometry: Geometry) -> str:
        output = self._reading.image
        if output is None or self._roles.is_controlnet:
            return ""
        shape = run.known.get(output.name, ())
        if len(shape) != 4 or shape[2:] == (geometry.height, geometry.width):
            return ""
        return f"output {output.name}: is {show(shape[2:])} for a sample of {geometry.height}×{geometry.width}"


def _size(dim: DeclaredDim, symbol: str | None, geometry: Geometry) -> int | None:
    if isinstance(dim, int):
        return dim
    try:
        return geometry.sizes[symbol] if symbol else Dim.parse(dim or "").at(geometry.sizes)
    except (ValueError, KeyError):
        return None
