"""ControlNets whose residuals a MultiControlNetModel could not add to one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, show
from shapecheck.contract.mismatch import compare
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import MismatchKind
from shapecheck.explain.call_log import Watched
from shapecheck.explain.explained_error import ExplainedError, last_line
from shapecheck.explain.parse_text import read_symptoms
from shapecheck.explain.traceback_calls import find_calls, find_raising_module
from shapecheck.runtime.residual_checks import read_geometry

_FILE = "multicontrolnet"
"""How the files of diffusers begin whose modules add the residuals of several ControlNets."""


_OF_SUMS = ("broadcast", "output", "rank")
"""Symptoms of an addition."""


_MID = SHAPECHECK.mid


class _Side(NamedTuple):
    """One of two ControlNets: what it is called, and its residuals by slot."""

    name: str
    shapes: Mapping[str, Shape]


def explain_sum(error: BaseException, watched: Watched, contract: Callable[[], Contract]) -> ExplainedError | None:
    """Say which two ControlNets do not go together, if this was raised as their residuals were added.

    None if it was not, or if not every ControlNet of the sum is watched. `contract` is asked for only if it was.
    """
    adding = find_raising_module(error, _FILE)
    if adding is None or not any(symptom.kind in _OF_SUMS for symptom in read_symptoms(str(error))):
        return None
    sides = [
        _Side(f"{net.place} ({net.class_name})", {name: tuple(tensor.shape) for name, tensor in net.residuals.items()})
        for net in watched.emissions_of(list(getattr(adding, "nets", ())))
    ]
    for one, other in combinations(sides, 2):
        if slot := _find_clash(one, other, in_place=one is sides[0]):
            lines = [
                f"{type(adding).__name__} failed: {last_line(error)}",
                f"  where: {slot}: {one.name} gives {show(one.shapes[slot])}, {other.name} {show(other.shapes[slot])}",
                *_explain_difference(one, other),
            ]
            call = find_calls(error, lambda module: module is adding)[-1]
            geometry = read_geometry(contract(), call.kwargs.get("sample", call.args[0] if call.args else None))
            if isinstance(geometry, Geometry):
                fitting = [side.name for side in (one, other) if not compare(contract().slots, geometry, side.shapes)]
                lines += [f"  the UNet takes what {fitting[0]} gives"] if len(fitting) == 1 else []
            lines.append(f"  what {other.name} gives, where {one.name} differs")
            return ExplainedError("\n".join(lines), tuple(_list_mismatches(one, other)), contract(), None)
    return None


def _find_clash(one: _Side, other: _Side, *, in_place: bool) -> str:
    """Return the first slot at which these cannot be added, or nothing. The first ControlNet's mid is added to in place."""
    for name, shape in one.shapes.items():
        if name in other.shapes:
            total = _broadcast(shape, other.shapes[name])
            if total is None or (in_place and name == _MID and total != shape):
                return name
    return ""


def _broadcast(one: Shape, other: Shape) -> Shape | None:
    """Return the shape of the sum; None if PyTorch refuses it."""
    rank = max(len(one), len(other))
    pairs = list(zip(*((1,) * (rank - len(shape)) + shape for shape in (one, other)), strict=True))
    return None if any(a != b and 1 not in (a, b) for a, b in pairs) else tuple(b if a == 1 else a for a, b in pairs)


def _explain_difference(one: _Side, other: _Side) -> tuple[str, str]:
    """Say what the two were made for, or ran at, by what differs."""
    flat, beside = tuple(one.shapes.values()), tuple(other.shapes.values())
    if [shape[1:2] for shape in flat] == [shape[1:2] for shape in beside]:
        # the first residuals are as large as the latents
        apart = "sizes" if flat[0][2:] != beside[0][2:] else "batches" if flat[0][:1] != beside[0][:1] else ""
        if apart:
            change = "  change: give both the same latents, and images of one size and batch"
            return f"  fault: these two ControlNets ran at different {apart}", change
    counts = "" if len(flat) == len(beside) else f": they give {len(flat) - 1} and {len(beside) - 1} down residuals"
    change = "  change: take ControlNets that are made for one UNet"
    return f"  fault: these two ControlNets are not for one UNet{counts}", change


def _list_mismatches(one: _Side, other: _Side) -> Iterator[Mismatch]:
    """Yield every slot at which they differ, in slot order."""
    names = dict.fromkeys((*list(one.shapes)[:-1], *list(other.shapes)[:-1], _MID))
    for name in names:
        expected, actual = one.shapes.get(name), other.shapes.get(name)
        if expected != actual:
            kind = _classify_mismatch(expected, actual)
            yield Mismatch(kind, name, actual or "nothing", expected or "nothing", controlnet=other.name)


def _classify_mismatch(expected: Shape | None, actual: Shape | None) -> MismatchKind:
    if expected is None or actual is None:
        return "surplus" if actual else "missing"
    if len(expected) != len(actual):
        return "rank"
    return "channels" if expected[1] != actual[1] else "size" if expected[2:] != actual[2:] else "batch"
