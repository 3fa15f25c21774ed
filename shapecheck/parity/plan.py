"""The checks of a parity run and the calls that decide them: known from the contract and the sizes, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.parity.cases import BOTH, ForwardCase, count_varied, residual_slots
from shapecheck.parity.metrics import reference_device
from shapecheck.parity.results import Check
from shapecheck.runtime.torch_session import output_names
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.size_ranges import request_ranges

FILE_KINDS = ("provider", "contract", "weights", "precision")
"""Checks that need no call."""


@dataclass(frozen=True, slots=True)
class PlannedCheck:
    """A check, and the calls that decide it, the judged one last; for `switch` all of them, in this order."""

    check: Check
    cases: tuple[ForwardCase, ...] = ()
    output: str = ""
    """The output that is judged; empty for each of them."""


def choose_geometries(contract: Contract, ranges: Sequence[Range]) -> tuple[Geometry, ...]:
    """Return an engine's sizes, as `SizeRequest.list_geometries` does; without any small ones, and the model's own on a GPU.

    Of the small ones one is of a batch of 6, one has 154 tokens, and one is above 1,000 cells.
    """
    step = contract.divisor
    if not ranges:
        large = [Geometry(1, -(-32 // step) * step, -(-40 // step) * step)]
        own = contract.config.get("sample_size")
        if reference_device() == "cuda" and own:
            sides = (own, own) if isinstance(own, int) else tuple(own)
            large = [Geometry(1, *(-(-side // step) * step for side in sides))]
        # Inputs are perturbed at the first, its tokens among them: what is lost of a long prompt shows as a lesser effect.
        long = Geometry(2, 9 * step, 17 * step, 2 * USUAL_TOKENS)
        return long, Geometry(6, 8 * step, 14 * step), Geometry(1, 24 * step, 40 * step), *large

    return request_ranges(ranges).list_geometries((), step)


def plan_checks(contract: Contract, backend: str, geometries: Sequence[Geometry]) -> tuple[PlannedCheck, ...]:
    """Return every check of one backend, in the order in which they explain each other."""
    small = min(geometries, key=_count_cells)
    wide = max(geometries, key=lambda geometry: (geometry.batch, -_count_cells(geometry)))
    off, slots = ForwardCase(small), residual_slots(contract)
    plans = [PlannedCheck(Check(backend, kind, "")) for kind in FILE_KINDS]  # type: ignore[arg-type]  # mypy widens the literals
    for kind, parts in (("input", contract.inputs), ("slot", slots)):
        checks = [Check(backend, kind, part.name) for part in parts]  # type: ignore[arg-type]  # likewise
        plans += [PlannedCheck(check, (off, ForwardCase(small, perturbed=check.where))) for check in checks]
    if slots:
        even = [geometry for geometry in geometries if geometry.batch % 2 == 0]
        if even:  # without a batch of two halves there is no guidance
            halves = min(even, key=_count_cells)
            plans.append(PlannedCheck(Check(backend, "cfg", ""), (ForwardCase(halves), ForwardCase(halves, 0, half=True))))
        frames = (0, None, BOTH, 1, None, 0)  # every combination of on and off of two ControlNets
        plans.append(PlannedCheck(Check(backend, "switch", ""), tuple(ForwardCase(small, frame) for frame in frames)))
    on = 0 if slots else None
    for geometry in geometries:
        if slots and geometry == small:
            plans += _plan_case(contract, backend, ForwardCase(geometry))
        if geometry != wide or geometry == small:
            plans += _plan_case(contract, backend, ForwardCase(geometry, on))
        if geometry == wide:
            for number in range(count_varied(geometry.batch)):
                plans += _plan_case(contract, backend, ForwardCase(geometry, on, varied=number))
    if slots and contract.slots:
        plans += _plan_case(contract, backend, ForwardCase(small, 0, pooled=True))
    return (*plans, *_plan_rounding(contract, backend, plans))


def _plan_rounding(contract: Contract, backend: str, plans: Sequence[PlannedCheck]) -> list[PlannedCheck]:
    """Judge the errors of the usual calls together in a half precision: of float32 nobody sees them.

    In varied calls, whose text is as loud as real encoders make it, healthy backends differ too much.
    """
    if contract.dtype not in ("float16", "bfloat16"):
        return []
    calls = list_cases([plan for plan in plans if plan.check.kind == "case" and plan.cases[0].varied is None])
    return [PlannedCheck(Check(backend, "rounding", ""), calls)]


def plan_outputs(contract: Contract, backend: str, geometries: Sequence[Geometry]) -> tuple[PlannedCheck, ...]:
    """Return the shortest proof that a backend computes the same: what runs, and every output once a size."""
    frame = 0 if residual_slots(contract) else None
    plans = [plan for geometry in geometries for plan in _plan_case(contract, backend, ForwardCase(geometry, frame))]
    return (PlannedCheck(Check(backend, "provider", "")), *plans)


def _plan_case(contract: Contract, backend: str, case: ForwardCase) -> list[PlannedCheck]:
    where = str(case.geometry)
    if case.varied is not None:
        where = str(case)
    elif residual_slots(contract):
        where += f", control {'off' if case.frame is None else 'on'}" + (", pooled residuals" if case.pooled else "")
    names = output_names(contract)
    return [
        PlannedCheck(Check(backend, "case", f"{where}, {name}" if len(names) > 1 else where), (case,), name) for name in names
    ]


def list_cases(plans: Sequence[PlannedCheck]) -> tuple[ForwardCase, ...]:
    """Return every call, once."""
    return tuple(dict.fromkeys(case for plan in plans for case in plan.cases))


def _count_cells(geometry: Geometry) -> int:
    return geometry.height * geometry.width * geometry.batch
