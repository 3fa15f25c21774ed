"""Decide whether a simulated failure is the one that a text describes, and which slot a name means."""

from __future__ import annotations

import re

from shapecheck.contract import Contract, Shape
from shapecheck.contract.naming import SHAPECHECK, residual_index
from shapecheck.explain.predicted_messages import merge_axes
from shapecheck.explain.residual_table import ResidualShapes, ResidualTable
from shapecheck.explain.simulate import Failure
from shapecheck.explain.symptom import Symptom

_UP = re.compile(r"up_blocks[._](\d+)")


def reproduces(symptom: Symptom, failure: Failure, table: ResidualTable) -> bool:
    """Return whether PyTorch, or a graph made of it, would say exactly this of that failure."""
    if symptom.stage not in (None, failure.stage):
        return False
    expected, actual = failure.expected, failure.actual
    match symptom.kind:
        case "unequal":
            return _fits_unequal(symptom, failure)
        case kind if kind != failure.kind:
            return False
        case "groups":
            return symptom.expected in expected and symptom.actual_shape == actual
        case "norm" | "output" | "upsample":
            return (symptom.expected_shape, symptom.actual_shape) == (expected, actual)
        case "rank":
            return (symptom.expected, symptom.actual) == (len(expected), len(actual))
        case "reshape":
            return (symptom.expected_shape, (symptom.actual,)) == (expected, actual)
        case "attention":
            return (symptom.expected, symptom.actual) == (expected[0], actual[0])
        case "broadcast" | "concat":
            # the node that a text names may be in the block that fails
            block = next((match for name in symptom.names if (match := _UP.search(name))), None)
            in_block = block is None or failure.module == f"up_blocks.{block[1]}"
            return in_block and _fits_sizes(symptom, failure, table)
        case _:
            return True


def _fits_sizes(symptom: Symptom, failure: Failure, table: ResidualTable) -> bool:
    expected, actual = failure.sizes
    if symptom.axis not in (None, failure.axis) or symptom.actual not in (None, actual):
        return False
    if symptom.stride is None:
        if symptom.expected not in (None, expected):
            return False
    elif failure.axis < 2 or [slot.stride for slot in table.contract.slots if slot.name == failure.slot] != [symptom.stride]:
        return False  # a size printed as a formula is on a spatial axis, of a slot with that stride
    if failure.kind != "broadcast":
        return True
    return symptom.expected_shape in ((), merge_axes(failure)) and symptom.actual_shape in ((), failure.actual)


def _fits_unequal(symptom: Symptom, failure: Failure) -> bool:
    """Return whether ONNX Runtime says this of an addition: two sizes, the smaller first, and the name of a node."""
    if failure.kind != "broadcast" or failure.stage not in ("down", "mid"):
        return False
    if tuple(sorted(failure.sizes)) != symptom.actual_shape or (symptom.axis == 3) != (failure.axis == 3):
        return False
    nodes = [name for name in symptom.names if "residual" in name or "control" in name]
    return not nodes or failure.slot in nodes[0] or not re.search(r"(residual|control)_\d|mid_block_residual", nodes[0])


def find_slot(name: str, contract: Contract) -> str | None:
    """Return our name of the slot that an input stands for, or None if this UNet has no such slot."""
    index = residual_index(name)
    if index is None:
        return None
    ours = SHAPECHECK.mid if index < 0 else SHAPECHECK.down(index)
    return ours if any(slot.name == ours for slot in contract.slots) else None


def is_of_slot(symptom: Symptom, table: ResidualTable, residuals: ResidualShapes, slot: str) -> bool:
    """Return whether `residuals` has at that slot what a text says it received, and that is the first that is wrong.

    Inputs are assumed to be checked in slot order, and graphs to know the channels of each.
    """
    shapes, right_shapes = residuals.named, table.right.named
    shape, right = shapes.get(slot, ()), right_shapes[slot]
    before = table.names[: table.names.index(slot)]
    if not shape or shape == right or any(shapes[name][-3:-2] != right_shapes[name][1:2] for name in before if name in shapes):
        return False
    if symptom.actual is not None and symptom.axis is None:  # ranks alone
        return len(shape) == symptom.actual
    if symptom.axis is not None and symptom.actual is not None:
        return len(shape) == 4 and shape[symptom.axis] == symptom.actual and right[symptom.axis] == symptom.expected
    differs = symptom.actual_shape != symptom.expected_shape
    return _may_stand_for(symptom.expected_shape, right) and _may_stand_for(symptom.actual_shape, shape) and differs


def _may_stand_for(printed: Shape, shape: Shape) -> bool:
    """Return whether a shape may be printed so: -1 stands for any size, and the last axes may be left out."""
    return len(printed) <= len(shape) and all(size in (-1, known) for size, known in zip(printed, shape, strict=False))
