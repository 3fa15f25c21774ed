"""ControlNets whose residuals a MultiControlNetModel could not add to one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from torch import nn

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, show
from shapecheck.contract.mismatch import compare
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import MismatchKind
from shapecheck.explain.call_log import Emission, Watched
from shapecheck.explain.explained_error import ExplainedError, last_line
from shapecheck.explain.parse_text import symptoms
from shapecheck.explain.traceback_calls import calls, raised_in
from shapecheck.runtime.residual_checks import geometry_of

_FILE = "multicontrolnet"
"""How the files of diffusers begin whose modules add the residuals of several ControlNets."""


_OF_SUMS = ("broadcast", "output", "rank")
"""Symptoms of an addition."""


_MID = SHAPECHECK.mid


class _Side(NamedTuple):
    """One of two ControlNets: what it is called, and its residuals by slot."""

    name: str
    shapes: Mapping[str, Shape]


def explained_sum(error: BaseException, watched: Watched, contract: Callable[[], Contract]) -> ExplainedError | None:
    """Which two ControlNets do not go together, where this was raised as their residuals were added.

    None where it was not, or where not every ControlNet of the sum is watched. `contract` is asked for where it is.
    """
    adding = raised_in(error, _FILE)
    if adding is None or not any(each.kind in _OF_SUMS for each in symptoms(str(error))):
        return None
    sides = [_side(each) for each in watched.emissions_of(list(getattr(adding, "nets", ())))]
    for one, other in combinations(sides, 2):
        if slot := _clash(one, other, in_place=one is sides[0]):
            lines = [
                f"{type(adding).__name__} failed: {last_line(error)}",
                f"  where: {slot}: {one.name} gives {show(one.shapes[slot])}, {other.name} {show(other.shapes[slot])}",
                *_fault(one, other),
                *_fitting(one, other, contract(), error, adding),
                f"  what {other.name} gives, where {one.name} differs",
            ]
            return ExplainedError("\n".join(lines), tuple(_mismatches(one, other)), contract(), None)
    return None


def _side(emission: Emission) -> _Side:
    *downs, mid = (tuple(each.shape) for each in emission.residuals)
    shapes = {SHAPECHECK.down(index): shape for index, shape in enumerate(downs)}
    return _Side(f"{emission.place} ({emission.class_name})", shapes | {_MID: mid})


def _clash(one: _Side, other: _Side, *, in_place: bool) -> str:
    """The first slot at which these cannot be added; empty where all can. The first ControlNet's mid is added to in place."""
    for name in one.shapes:
        if name in other.shapes:
            total = _broadcast(one.shapes[name], other.shapes[name])
            if total is None or (in_place and name == _MID and total != one.shapes[name]):
                return name
    return ""


def _broadcast(one: Shape, other: Shape) -> Shape | None:
    """The shape of the sum; None where PyTorch refuses it."""
    rank = max(len(one), len(other))
    pairs = list(zip(*((1,) * (rank - len(each)) + each for each in (one, other)), strict=True))
    return None if any(a != b and 1 not in (a, b) for a, b in pairs) else tuple(b if a == 1 else a for a, b in pairs)


def _fault(one: _Side, other: _Side) -> Iterator[str]:
    """What the two were made for, or ran at, by what differs."""
    flat, beside = tuple(one.shapes.values()), tuple(other.shapes.values())
    counts = "" if len(flat) == len(beside) else f": they give {len(flat) - 1} and {len(beside) - 1} down residuals"
    apart = "" if counts or [each[1:2] for each in flat] != [each[1:2] for each in beside] else _apart(flat[0], beside[0])
    if apart:
        yield f"  fault: these two ControlNets ran at different {apart}"
        yield "  change: give both the same latents, and images of one size and batch"
    else:
        yield f"  fault: these two ControlNets are not for one UNet{counts}"
        yield "  change: take ControlNets that are made for one UNet"


def _apart(one: Shape, other: Shape) -> str:
    """In what the first residuals differ, which are as large as the latents."""
    return "sizes" if one[2:] != other[2:] else "batches" if one[:1] != other[:1] else ""


def _fitting(one: _Side, other: _Side, contract: Contract, error: BaseException, adding: nn.Module) -> Iterator[str]:
    """Which of the two the UNet takes, where it is one of them."""
    call = calls(error, lambda module: module is adding)[-1]
    geometry = geometry_of(contract, call.kwargs.get("sample", call.args[0] if call.args else None))
    if isinstance(geometry, Geometry):
        fitting = [each.name for each in (one, other) if not compare(contract.slots, geometry, each.shapes)]
        if len(fitting) == 1:
            yield f"  the UNet takes what {fitting[0]} gives"


def _mismatches(one: _Side, other: _Side) -> Iterator[Mismatch]:
    """Every slot at which they differ, in slot order."""
    names = dict.fromkeys((*list(one.shapes)[:-1], *list(other.shapes)[:-1], _MID))
    for name in names:
        wanted, got = one.shapes.get(name), other.shapes.get(name)
        if wanted != got:
            yield Mismatch(_kind(wanted, got), name, got or "nothing", wanted or "nothing", controlnet=other.name)


def _kind(wanted: Shape | None, got: Shape | None) -> MismatchKind:
    if wanted is None or got is None:
        return "surplus" if got else "missing"
    if len(wanted) != len(got):
        return "rank"
    return "channels" if wanted[1] != got[1] else "size" if wanted[2:] != got[2:] else "batch"
