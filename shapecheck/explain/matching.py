"""Whether a failure is the one a text tells of."""

from __future__ import annotations

import re

from shapecheck.contract import Contract, Shape
from shapecheck.contract.naming import SCHEMES, SHAPECHECK, is_feature
from shapecheck.explain.residual_table import ResidualShapes, ResidualTable
from shapecheck.explain.simulate import Failure
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.torch_messages import merge_axes

_UP = re.compile(r"up_blocks[._](\d+)")


_NUMBERED = re.compile(r"down\D{0,40}?(\d{1,3})$|(?:control|residual)\D{0,20}?(\d{1,3})$")


def reproduces(symptom: Symptom, failure: Failure, table: ResidualTable) -> bool:
    """Tell if PyTorch, or a graph made of it, would say exactly this of that failure."""
    if symptom.stage not in (None, failure.stage):
        return False
    wanted, given = failure.wanted, failure.given
    match symptom.kind:
        case "unequal":
            return _fits_unequal(symptom, failure)
        case kind if kind != failure.kind:
            return False
        case "groups":
            return symptom.wanted in wanted and symptom.given_shape == given
        case "norm" | "output" | "upsample":
            return (symptom.wanted_shape, symptom.given_shape) == (wanted, given)
        case "rank":
            return (symptom.wanted, symptom.given) == (len(wanted), len(given))
        case "reshape":
            return (symptom.wanted_shape, (symptom.given,)) == (wanted, given)
        case "attention":
            return (symptom.wanted, symptom.given) == (wanted[0], given[0])
        case "broadcast" | "concat":
            # the node that a text names may be in the block that fails
            block = next((match for name in symptom.names if (match := _UP.search(name))), None)
            in_block = block is None or failure.module == f"up_blocks.{block[1]}"
            return in_block and _fits_sizes(symptom, failure, table)
        case _:
            return True


def find_slot(name: str, contract: Contract) -> str | None:
    """Our name of the slot that somebody's input is; None where it is none of this UNet."""
    index = residual_index(name)
    if index is None:
        return None
    ours = SHAPECHECK.mid if index < 0 else SHAPECHECK.down(index)
    return ours if any(slot.name == ours for slot in contract.slots) else None


def residual_index(name: str) -> int | None:
    """The number of the slot that an input is named after, -1 for mid; None for any other name."""
    if is_feature(name):
        return None
    known = [index for scheme in SCHEMES if (index := scheme.index(name)) is not None]
    return known[0] if known else _guessed(name)


def is_of_slot(symptom: Symptom, table: ResidualTable, given: ResidualShapes, slot: str) -> bool:
    """Whether this table gives that slot what a text says it was given, and that is the first that is wrong.

    Inputs are taken to be given in slot order, and graphs to know the channels of each.
    """
    right, shape = table.right.named[slot], given.named.get(slot, ())
    if not shape or shape == right or not _channels_fit(table, given, before=slot):
        return False
    if symptom.given is not None and symptom.axis is None:  # ranks alone
        return len(shape) == symptom.given
    if symptom.axis is not None and symptom.given is not None:
        return len(shape) == 4 and shape[symptom.axis] == symptom.given and right[symptom.axis] == symptom.wanted
    return _fills(symptom.wanted_shape, right) and _fills(symptom.given_shape, shape) and _differs(symptom)


def _fills(told: Shape, own: Shape) -> bool:
    """Whether a shape may be told so: -1 stands for any size, and axes at the end may be left out."""
    return len(told) <= len(own) and all(size in (-1, mine) for size, mine in zip(told, own, strict=False))


def _channels_fit(table: ResidualTable, given: ResidualShapes, *, before: str) -> bool:
    """Whether every slot before this one is given as many channels as it takes."""
    earlier = table.names[: table.names.index(before)]
    return all(given.named[name][-3:-2] == table.right.named[name][1:2] for name in earlier if name in given.named)


def _differs(symptom: Symptom) -> bool:
    return symptom.given_shape != symptom.wanted_shape


def _guessed(name: str) -> int | None:
    """The number in a name of no scheme that is known: down_block_3, mid."""
    if re.search(r"mid_?block|middle|\bmid\b", name):
        return -1
    match = _NUMBERED.search(name)
    return int(match[1] or match[2]) if match else None


def _fits_sizes(symptom: Symptom, failure: Failure, table: ResidualTable) -> bool:
    wanted, given = failure.sizes
    if symptom.axis not in (None, failure.axis):
        return False
    if symptom.stride is not None:  # told as a formula: on a spatial axis, of a slot with that stride
        strides = [slot.stride for slot in table.contract.slots if slot.name == failure.slot]
        if failure.axis < 2 or strides != [symptom.stride]:
            return False
    elif symptom.wanted not in (None, wanted):
        return False
    if symptom.given not in (None, given):
        return False
    if failure.kind != "broadcast":
        return True
    return symptom.wanted_shape in ((), merge_axes(failure)) and symptom.given_shape in ((), failure.given)


def _fits_unequal(symptom: Symptom, failure: Failure) -> bool:
    """Tell if ONNX Runtime says this of an addition: two sizes, the smaller first, and the name of a node."""
    if failure.kind != "broadcast" or failure.stage not in ("down", "mid"):
        return False
    if tuple(sorted(failure.sizes)) != symptom.given_shape or (symptom.axis == 3) != (failure.axis == 3):
        return False
    named = [name for name in symptom.names if "residual" in name or "control" in name]
    return not named or failure.slot in named[0] or not re.search(r"(residual|control)_\d|mid_block_residual", named[0])
