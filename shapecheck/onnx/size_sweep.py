"""A sweep of sizes: at which of them a graph works, and what its skips measure there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import Contract, Dim, Geometry, Mismatch, Shape, show
from shapecheck.contract.dims import BATCH, constant
from shapecheck.contract.size_request import SizeRequest
from shapecheck.observe import sizes
from shapecheck.onnx.foreign_inputs import is_shared
from shapecheck.onnx.input_roles import Roles, diffusers_names, match_inputs
from shapecheck.onnx.reading import Reading
from shapecheck.onnx.records import SizeLimits
from shapecheck.onnx.shapes import Shapes
from shapecheck.progress import Progress

_HALVINGS = 3
_PIXELS = (8, 4, 2, 1, 16)
"""Pixels of a ControlNet's picture to a latent cell, the usual number first."""
_VARIED = ((2, 77), (1, 11), (3, 154), (4, 77))
"""Batch and tokens of the sizes that are tried first."""
_USUAL = (64, 128, 96, 32, 16)
"""Sides of a square that a graph may have been traced at, and be for alone."""
_MOST = 2**20
"""No side of a real call is longer, and onnx counts in 64 bits."""
_SIGNIFICANT = ("encoder_hidden_states", "timestep")
"""Inputs, beside the sample, whose numbers fix a size of the call."""


@dataclass(frozen=True, slots=True)
class SizeSweep:
    """The shapes seen at each size, the sizes that work, and those that were requested."""

    runs: Mapping[Geometry, Shapes]
    limits: SizeLimits
    requested: tuple[Geometry, ...] = ()

    @property
    def working(self) -> dict[Geometry, Shapes]:
        return {geometry: run for geometry, run in self.runs.items() if not run.fault}

    def measured(self, skip: str) -> dict[Geometry, Shape]:
        """Return the shapes of a skip, (batch, channels, height, width), at the sizes that work; at all if none does."""
        shapes = {geometry: run.known.get(skip, ()) for geometry, run in (self.working or self.runs).items()}
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

    def find_faults(self) -> tuple[Mismatch, ...]:
        """Return in what the graph fails of what was requested; without that, only whether it works at no size at all.

        A file narrower than its model is not wrong: that is a limit.
        """
        if not self.requested:
            if self.limits.divisor:
                return ()
            cause = self.limits.reason
            return (Mismatch("sizes", "sample", "no size that was tried works", "works", self.limits.refused, cause=cause),)
        faults = [(geometry, fault) for geometry in self.requested if (fault := self._explain(geometry))]
        if not faults:
            return ()
        geometry, cause = faults[0]
        count = f" at {len(faults)} of {len(self.requested)} sizes" if len(self.requested) > 1 else ""
        return (Mismatch("sizes", "sample", f"does not work{count}", "works", geometry, cause=cause),)

    def _explain(self, geometry: Geometry) -> str:
        """Return why the graph fails at a requested size; nothing if it works."""
        others = {symbol: size for symbol, size in self.limits.fixed.items() if size != geometry.sizes[symbol]}
        if others:
            return f"the file fixes {', '.join(f'{symbol}={size}' for symbol, size in others.items())}"
        fault, divisor = self.runs[geometry].fault, self.limits.divisor
        if fault and divisor > 1 and (geometry.height % divisor or geometry.width % divisor):
            return f"it works at multiples of {divisor} cells; {fault}"
        return fault


def sweep_sizes(
    reading: Reading,
    roles: Roles,
    progress: Progress,
    *,
    contract: Contract | None = None,
    requested: SizeRequest | None = None,
) -> SizeSweep:
    """Try a graph at odd sizes; if it fails there, at multiples of 2, 4, … until it works. Then at what was requested.

    Multiples of the contract's divisor are among the sizes that are tried.
    """
    trial = _Trial(reading, roles, progress, _find_fixed(roles), contract)
    allowed = contract.divisor if contract else 1
    survey = sizes.list_survey_sizes(_HALVINGS)
    varied = [replace(at, batch=batch, tokens=tokens) for at, (batch, tokens) in zip(survey, _VARIED, strict=True)]
    refused = trial.find_refusal(varied)
    divisor, batches, tokens = 1, {at.batch: True for at in varied}, {at.tokens: True for at in varied}
    if refused:
        divisor = trial.find_divisor()
        works = next(iter(trial.working), None)
        batches, tokens = trial.vary(works) if works else ({}, {})
    elif allowed > 1 and trial.find_refusal(sizes.list_multiples(allowed, _HALVINGS)):
        divisor = 0
    geometries: tuple[Geometry, ...] = ()
    if requested is not None and (requested.ranges or requested.multiple):
        base = min(trial.working, key=lambda at: at.batch, default=survey[0].with_sizes(trial.fixed))
        coarse = sizes.list_coarse_sizes(math.lcm(allowed, requested.multiple or 1), _HALVINGS)
        usual = [replace(at, batch=base.batch, tokens=base.tokens) for at in coarse] if requested.multiple else [base]
        geometries = requested.list_geometries(usual, allowed)
        for geometry in geometries:
            trial.find_refusal([geometry])

    has_text = any("tokens" in roles.symbols(tensor) for tensor in roles.base)
    limits = SizeLimits(
        divisor,
        dict(sorted(trial.fixed.items())),
        dict(sorted(batches.items())) if "batch" not in trial.fixed else {},
        dict(sorted(tokens.items())) if has_text and "tokens" not in trial.fixed else {},
        tuple(dict.fromkeys((at.height, at.width) for at in trial.working)),
        refused,
        trial.runs[refused].fault if refused else "",
    )
    return SizeSweep(trial.runs, limits, geometries)


def _find_fixed(roles: Roles) -> dict[str, int]:
    """Return the sizes of a call that the file declares as numbers, by symbol."""
    known = [tensor for tensor in roles.base if diffusers_names(tensor)[0] in _SIGNIFICANT]
    fixed: dict[str, int] = {}
    for tensor in (*filter(None, [roles.sample]), *known):
        if is_shared(tensor.dims):
            continue  # one timestep for all rows says nothing of their number
        for symbol, dim in zip(roles.symbols(tensor), tensor.dims or (), strict=True):
            if symbol is not None and isinstance(dim, int):
                fixed.setdefault(symbol, dim)
    # Numbers in every residual fix the size as well; the first residual, which is the largest, is as large as the latent.
    declared = [tensor.dims for tensor in roles.slots if tensor.dims is not None and len(tensor.dims) == 4]
    for symbol, axis in (("batch", 0), ("h", 2), ("w", 3)):
        numbers = [dim for dims in declared if isinstance(dim := dims[axis], int)]
        if numbers and len(numbers) == len(roles.slots) and (axis == 0 or max(numbers) > 1):
            fixed.setdefault(symbol, max(numbers))
    return fixed


class _Trial:
    """A graph at one size after the other, as far as the file leaves them open."""

    def __init__(
        self, reading: Reading, roles: Roles, progress: Progress, fixed: dict[str, int], contract: Contract | None
    ) -> None:
        self._reading, self._roles, self._progress = reading, roles, progress
        self._rules = dict(contract.input_rules) if contract is not None and contract.role == "controlnet" else {}
        if contract is not None and contract.role == "unet":
            # A sum that is not found shows no skip to measure.
            pairs = match_inputs(roles, contract).slots
            self._rules |= {tensor.name: slot.shape for slot, tensor in pairs if tensor is not None and not tensor.adds}
        self.runs: dict[Geometry, Shapes] = {}
        self.fixed = fixed
        self._measure_pictures()

    @property
    def working(self) -> dict[Geometry, Shapes]:
        return {geometry: run for geometry, run in self.runs.items() if not run.fault}

    def _measure_pictures(self) -> None:
        """Find the pixels to a latent cell in pictures whose rule is not known: those with which the graph works."""
        images = [tensor for tensor in self._roles.base if tensor.is_image and tensor.dims and tensor != self._roles.sample]
        names = [name for tensor in images if (name := diffusers_names(tensor)[0]) not in self._rules]
        for pixels in _PIXELS if names and (self._roles.pictures or self._roles.is_controlnet) else ():
            rule = (BATCH, constant(3), Dim("h", pixels), Dim("w", pixels))
            rules = self._rules | dict.fromkeys(names, rule)
            if not _try_size(self._reading, self._roles, Geometry(2, 64, 128).with_sizes(self.fixed), rules).fault:
                self._rules = rules
                return

    def find_refusal(self, geometries: Iterable[Geometry]) -> Geometry | None:
        """Return the first of these sizes, as far as the file leaves them open, at which the graph fails."""
        for geometry in dict.fromkeys(geometry.with_sizes(self.fixed) for geometry in geometries):
            if geometry not in self.runs:
                self._progress(f"following the shapes at {geometry}")
                self.runs[geometry] = _try_size(self._reading, self._roles, geometry, self._rules)
            if self.runs[geometry].fault:
                return geometry
        return None

    def find_divisor(self) -> int:
        """Return the least power of 2 at whose multiples the graph works; 0 if at none.

        A batch may be why it fails: other ones are tried too. A graph that works at one usual size alone has that size fixed.
        """
        for batch in (2, 1):
            for divisor in (1,) if {"h", "w"} <= self.fixed.keys() else (1, 2, 4, 8, 16, 32, 64):
                tried = sizes.list_multiples(divisor, _HALVINGS) if divisor > 1 else sizes.list_survey_sizes(_HALVINGS)
                if self.find_refusal(replace(at, batch=batch) for at in tried) is None:
                    return divisor
        if not {"h", "w"} & self.fixed.keys():
            for side in _USUAL:
                for batch in (2, 1):
                    if self.find_refusal([Geometry(batch, side, side)]) is None:
                        self.fixed |= {"h": side, "w": side}
                        return 1
        return 0

    def vary(self, works: Geometry) -> tuple[dict[int, bool], dict[int, bool]]:
        """Return the batches and the numbers of tokens that were tried at a size that works, and whether each works."""
        batches, tokens = {works.batch: True}, {works.tokens: True}
        for batch, length in ((3, 11), (1, 154), (4, works.tokens), (2, works.tokens)):
            both = self.find_refusal([replace(works, batch=batch, tokens=length)]) is None
            batches[batch] = both or self.find_refusal([replace(works, batch=batch)]) is None
            tokens[length] = both or self.find_refusal([replace(works, tokens=length)]) is None
        return batches, tokens


def _try_size(reading: Reading, roles: Roles, geometry: Geometry, rules: Mapping[str, tuple[Dim, ...]]) -> Shapes:
    """Return the shapes if residuals are as large as their skips.

    A residual of one cell fits every skip, so that what it should measure is seen in the skip. If the graph reads sizes off
    residuals, they get the sizes that were seen, until these are the sizes they had.
    """
    shapes: dict[str, Sequence[int | None]] = {tensor.name: (1, 1, 1, 1) for tensor in roles.added}
    for tensor in roles.added:
        if tensor.name in rules:
            shapes[tensor.name] = geometry.shape_of(rules[tensor.name])
        elif tensor.live and not tensor.adds and tensor.dims:  # it may not go into a sum, where one cell would do
            shapes[tensor.name] = [_measure(dim, None, None, geometry) for dim in tensor.dims]
    shapes |= _measure_inputs(roles, geometry, rules)
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
    if image and len(shape) == 4 and shape[0] != geometry.batch:
        return Shapes(run.known, f"output {image.name}: is of batch {shape[0]} for a batch of {geometry.batch}")
    if image and len(shape) == 4 and shape[2:] != (geometry.height, geometry.width):
        sample = f"a sample of {geometry.height}×{geometry.width}"
        return Shapes(run.known, f"output {image.name}: is {show(shape[2:])} for {sample}")
    return run


def _measure_inputs(roles: Roles, geometry: Geometry, rules: Mapping[str, tuple[Dim, ...]]) -> dict[str, Sequence[int | None]]:
    """Return the shapes of the base inputs; of an axis None if nothing tells its size."""
    meanings: dict[str, str] = {}
    for tensor in sorted(roles.base, key=lambda tensor: tensor != roles.sample):
        for symbol, dim in zip(roles.symbols(tensor), tensor.dims or (), strict=True):
            if symbol is not None and isinstance(dim, str):
                meanings.setdefault(dim, symbol)
    shapes: dict[str, Sequence[int | None]] = {}
    for tensor in roles.base:
        if tensor.dims is None:
            continue
        symbols = roles.symbols(tensor)
        rule = rules.get(diffusers_names(tensor)[0], ())
        sides = rule if len(rule) == len(tensor.dims) else (None,) * len(tensor.dims)
        axes = zip(tensor.dims, symbols, sides, strict=True)
        shapes[tensor.name] = [
            _measure(dim, symbol or (meanings.get(dim) if isinstance(dim, str) else None), side, geometry)
            for dim, symbol, side in axes
        ]
    return shapes


def _measure(dim: int | str | None, symbol: str | None, side: Dim | None, geometry: Geometry) -> int | None:
    """Return the size of a declared axis, or None if no rule, symbol or name tells it."""
    if isinstance(dim, int):
        return dim
    try:
        rule = side if side is not None and side.symbol else Dim(symbol) if symbol else Dim.parse(dim or "")
        size = rule.at(geometry.sizes)
    except (ValueError, KeyError):
        return None
    return size if 0 < size <= _MOST else None
