"""Decide whether wrong residuals explain the very exception that was raised: much that is wrong is added in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Mismatch
from shapecheck.explain.matching import find_slot, reproduces
from shapecheck.explain.parse_text import find_symptoms, flatten_text
from shapecheck.explain.predicted_messages import format_message
from shapecheck.explain.residual_table import ResidualShapes, ResidualTable, right_shapes
from shapecheck.explain.simulate import FailureKind, lay_out_unet, simulate_call
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.traceback_calls import FailedCall
from shapecheck.runtime.unet_call import DOWNS, FEATURES, Call

Reason = Literal["shape", "dtype", "device", "container", "value", "mid", "name"]
"""The property of residuals that an exception is about: `container` is a list that is not one, `value` an item that is not a
tensor, `mid` a missing mid residual, `name` an input that the text itself names."""
_SHAPES = {"channels", "size", "rounding", "batch", "rank", "broadcast", "missing", "surplus"}
_OF_SHAPES = (*get_args(FailureKind), "unequal", "dimensions")
_OF_DTYPES = re.compile(r"\bd(?:ata)?types?\b|\bscalar types?\b")
_OF_DEVICES = re.compile(r"\bsame device\b|not on the expected device")
_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc")


def is_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: no residual explains that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_OF_MEMORY.search(str(error)))


def find_reasons(
    traced: FailedCall, call: Call, contract: Contract, geometry: Geometry, mismatches: Sequence[Mismatch]
) -> set[Reason]:
    """Return the reasons for which residuals explain the exception of this call; none if `mismatches` do not explain it."""
    error, text = traced.error, str(traced.error)
    if is_of_memory(error) or (call.downs is None and call.features is None) or _is_before(traced, call, contract):
        return set()
    symptoms = find_symptoms(flatten_text(text))
    kinds = {mismatch.kind for mismatch in mismatches}
    at_fault = {mismatch.where for mismatch in mismatches}
    of_dtypes = isinstance(error, (RuntimeError, TypeError)) and bool(_OF_DTYPES.search(text))
    of_type = isinstance(error, (TypeError, AttributeError)) and not traced.inside
    if DOWNS in at_fault:
        has_other_value = not isinstance(call.downs, Tensor) or not call.downs.dim()
    else:
        residuals = (*(call.downs or ()), *(() if call.mid is None else (call.mid,))) if of_type else ()
        has_other_value = not all(isinstance(residual, Tensor) for residual in residuals)
    holds: dict[Reason, bool] = {
        "shape": bool(kinds & _SHAPES or DOWNS in at_fault) and _is_foretold(text, symptoms, call, contract, geometry),
        "dtype": "dtype" in kinds and (of_dtypes or any(symptom.kind == "dtype" for symptom in symptoms)),
        "device": "device" in kinds and bool(_OF_DEVICES.search(text)),
        "container": FEATURES in at_fault and "has no attribute 'pop'" in text,
        "value": of_type and has_other_value,
        "mid": call.mid is None and call.downs is not None and contract.slots[-1].name in at_fault,
        "name": any(find_slot(name, contract) in at_fault for symptom in symptoms for name in symptom.names),
    }
    return {reason for reason, is_held in holds.items() if is_held}


def _is_before(traced: FailedCall, call: Call, contract: Contract) -> bool:
    """Return whether a module raised it that runs before any residual is added.

    A ControlNet's are added after the way down and after mid; only the modules of the way up, and those after it, get them.
    """
    if call.mid is None or call.features is not None or not traced.inside:
        return False
    before = {slot.producer.split(".")[0] for slot in contract.slots} - {slot.up_block.split(".")[0] for slot in contract.slots}
    top = traced.inside.split(".")[0]
    return top in before or top.endswith(("_embedding", "_proj"))


def _is_foretold(text: str, symptoms: Iterable[Symptom], call: Call, contract: Contract, geometry: Geometry) -> bool:
    """Return whether residuals of these shapes fail so; if that cannot be simulated, whether the text is of shapes at all."""
    unet, downs = lay_out_unet(contract, geometry), call.downs
    if downs is None:
        return False
    # an iterator was consumed by the call, so that its residuals are not known any more
    is_list = isinstance(downs, (list, tuple)) or (isinstance(downs, Tensor) and downs.dim())
    if unet is None or not is_list:
        return any(symptom.kind in _OF_SHAPES for symptom in symptoms)

    # a right shape stands in for what is not a tensor; surplus residuals are never added
    right, count = right_shapes(contract, geometry), len(downs)
    expected = (*right.downs, *((),) * count)[:count]
    pairs = zip((*downs, call.mid), (*expected, right.mid or ()), strict=True)
    flat = [tuple(value.shape) if isinstance(value, Tensor) else shape for value, shape in pairs]
    failure = simulate_call(unet, ResidualShapes(tuple(flat[:-1]), None if call.mid is None else flat[-1]))
    if failure is None:
        return False
    if any(words in text for words in (format_message(failure), format_message(failure, meta=True)) if words):
        return True
    table = ResidualTable.of(contract, geometry)
    return any(reproduces(symptom, failure, table) for symptom in symptoms)
