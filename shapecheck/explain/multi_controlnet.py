"""ControlNets whose residuals a MultiControlNetModel could not add to one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, show
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import MismatchKind
from shapecheck.explain.call_log import CallLog
from shapecheck.explain.explained_error import ExplainedError, last_line
from shapecheck.explain.parse_text import find_symptoms, flatten_text
from shapecheck.explain.simulate import broadcast, find_clash
from shapecheck.explain.traceback_calls import find_calls, find_raising_module
from shapecheck.runtime.residual_checks import read_geometry


def explain_sum(error: BaseException, log: CallLog, contract: Callable[[], Contract]) -> ExplainedError | None:
    """Say which two ControlNets do not go together, if this was raised as their residuals were added.

    None if it was not, or if not every ControlNet of the sum is watched. `contract` is called only if it was.
    """
    # modules that add the residuals of several ControlNets are in files of diffusers that begin so
    adding = find_raising_module(error, "multicontrolnet")
    if adding is None:
        return None
    if not any(symptom.kind in ("broadcast", "output", "rank") for symptom in find_symptoms(flatten_text(str(error)))):
        return None
    nets = {
        f"{net.place} ({net.class_name})": {name: tuple(tensor.shape) for name, tensor in net.residuals.items()}
        for net in log.emissions_of(list(getattr(adding, "nets", ())))
    }
    for (name, one), (other_name, other) in combinations(nets.items(), 2):
        if slot := _find_slot(one, other, in_place=name == next(iter(nets))):
            lines = [
                f"{type(adding).__name__} failed: {last_line(error)}",
                f"  where: {slot}: {name} gives {show(one[slot])}, {other_name} {show(other[slot])}",
                *_explain_difference(one, other),
            ]
            call = find_calls(error, lambda module: module is adding)[-1]
            geometry = read_geometry(contract(), call.kwargs.get("sample", call.args[0] if call.args else None))
            if isinstance(geometry, Geometry):
                fitting = [net for net in (name, other_name) if not compare_shapes(contract().slots, geometry, nets[net])]
                lines += [f"  the UNet takes what {fitting[0]} gives"] if len(fitting) == 1 else []
            lines.append(f"  what {other_name} gives, where {name} differs")
            return ExplainedError("\n".join(lines), tuple(_list_mismatches(one, other, other_name)), contract(), None)
    return None


def _find_slot(one: Mapping[str, Shape], other: Mapping[str, Shape], *, in_place: bool) -> str:
    """Return the first slot at which these cannot be added, or nothing. The first ControlNet's mid is added to in place."""
    for name, shape in one.items():
        if name in other:
            pair = shape, other[name]
            if find_clash(*pair) is not None or (in_place and name == SHAPECHECK.mid and broadcast(*pair) != shape):
                return name
    return ""


def _explain_difference(one: Mapping[str, Shape], other: Mapping[str, Shape]) -> tuple[str, str]:
    """Say what the two were made for, or ran at, by what differs."""
    shapes, other_shapes = tuple(one.values()), tuple(other.values())
    if [shape[1:2] for shape in shapes] == [shape[1:2] for shape in other_shapes]:
        # the first residuals are as large as the latents
        first, beside = shapes[0], other_shapes[0]
        unlike = "sizes" if first[2:] != beside[2:] else "batches" if first[:1] != beside[:1] else ""
        if unlike:
            change = "  change: give both the same latents, and images of one size and batch"
            return f"  fault: these two ControlNets ran at different {unlike}", change
    counts = f": they give {len(shapes) - 1} and {len(other_shapes) - 1} down residuals" * (len(shapes) != len(other_shapes))
    change = "  change: take ControlNets that are made for one UNet"
    return f"  fault: these two ControlNets are not for one UNet{counts}", change


def _list_mismatches(one: Mapping[str, Shape], other: Mapping[str, Shape], other_name: str) -> Iterator[Mismatch]:
    for name in dict.fromkeys((*list(one)[:-1], *list(other)[:-1], SHAPECHECK.mid)):
        expected, actual = one.get(name), other.get(name)
        if expected == actual:
            continue
        kind: MismatchKind
        if expected is None or actual is None:
            kind = "surplus" if actual else "missing"
        elif len(expected) != len(actual):
            kind = "rank"
        else:
            kind = "channels" if expected[1] != actual[1] else "size" if expected[2:] != actual[2:] else "batch"
        yield Mismatch(kind, name, actual or "nothing", expected or "nothing", controlnet=other_name)
