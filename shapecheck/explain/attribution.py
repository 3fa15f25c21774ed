"""Whether residuals that are wrong explain the very exception that was raised: much that is wrong is added in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Mismatch, Shape
from shapecheck.contract.records import MismatchKind
from shapecheck.explain.matching import gives, slot_of
from shapecheck.explain.parse_text import symptoms
from shapecheck.explain.residual_table import Given, Table, right
from shapecheck.explain.simulate import outcome
from shapecheck.explain.symptom import Symptom, SymptomKind
from shapecheck.explain.torch_messages import eager, meta
from shapecheck.explain.traceback_calls import Traced
from shapecheck.explain.unet_layout import anatomy
from shapecheck.runtime.unet_call import DOWNS, FEATURES, Call

Reason = Literal["shape", "dtype", "device", "container", "value", "mid", "name"]
"""What of the residuals an exception is about: `container` is a list that is none, `value` an item that is no tensor, `mid`
one that is missing, `name` an input that the text itself names."""


_SHAPES: frozenset[MismatchKind] = frozenset(
    ("channels", "size", "rounding", "batch", "rank", "broadcast", "missing", "surplus")
)


_OF_SHAPES: tuple[SymptomKind, ...] = (
    "broadcast", "output", "concat", "rank", "norm", "groups", "index", "attention", "reshape", "upsample", "keyword",
    "unequal", "dimensions",
)  # fmt: skip


_OF_DTYPES = re.compile(r"\bd(?:ata)?types?\b|\bscalar types?\b")


_OF_DEVICES = re.compile(r"\bsame device\b|not on the expected device")


_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc")


def is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: no residual explains that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_OF_MEMORY.search(str(error)))


def reasons(traced: Traced, call: Call, contract: Contract, geometry: Geometry, found: Sequence[Mismatch]) -> set[Reason]:
    """What of the residuals explains the exception that came through this call; empty where `found` does not explain it."""
    if is_of_memory(traced.error) or (call.downs is None and call.features is None) or _is_before(traced, call, contract):
        return set()
    text = str(traced.error)
    told = symptoms(text)
    kinds = {each.kind for each in found}
    at_fault = {each.where for each in found}
    is_of_type = isinstance(traced.error, (TypeError, AttributeError))
    holds: dict[Reason, bool] = {
        "shape": bool(kinds & _SHAPES or DOWNS in at_fault) and _is_foretold(text, told, call, contract, geometry),
        "dtype": "dtype" in kinds and _is_of_dtypes(traced.error, told),
        "device": "device" in kinds and bool(_OF_DEVICES.search(text)),
        "container": FEATURES in at_fault and "has no attribute 'pop'" in text,
        "value": is_of_type and not traced.inside and _is_no_tensor(call, at_fault),
        "mid": call.mid is None and call.downs is not None and contract.slots[-1].name in at_fault,
        "name": any(slot_of(name, contract) in at_fault for each in told for name in each.names),
    }
    return {reason for reason in get_args(Reason) if holds[reason]}


def _is_before(traced: Traced, call: Call, contract: Contract) -> bool:
    """Whether it was raised by a module that runs before any residual is added.

    A ControlNet's are added after the way down and after mid; only the modules of the way up, and those after it, take them.
    """
    if call.mid is None or call.features is not None or not traced.inside:
        return False
    before = {slot.producer.split(".")[0] for slot in contract.slots} - {slot.up_block.split(".")[0] for slot in contract.slots}
    top = traced.inside.split(".")[0]
    return top in before or top.endswith(("_embedding", "_proj"))


def _is_foretold(text: str, told: Iterable[Symptom], call: Call, contract: Contract, geometry: Geometry) -> bool:
    """Whether residuals of these shapes fail so; where nothing can be foretold, whether the text is of shapes at all."""
    if call.downs is None:
        return False
    unet, given = anatomy(contract, geometry), _shapes_of(call, contract, geometry)
    if unet is None or given is None:
        return any(each.kind in _OF_SHAPES for each in told)
    failure = outcome(unet, given)
    if failure is None:
        return False
    if any(words in text for words in (eager(failure), meta(failure)) if words):
        return True
    table = Table.of(contract, geometry)
    return any(gives(each, failure, table) for each in told)


def _shapes_of(call: Call, contract: Contract, geometry: Geometry) -> Given | None:
    """The shapes that are added, a right one in place of what is no tensor; None where these are not known any more."""
    if not isinstance(call.downs, (list, tuple)) and not (isinstance(call.downs, Tensor) and call.downs.dim()):
        return None
    wanted, count = right(contract, geometry), len(call.downs)
    own = (*wanted.downs, *((),) * count)[:count]  # what is surplus is never added
    downs = tuple(_shape_of(value, shape) for value, shape in zip(call.downs, own, strict=True))
    return Given(downs, None if call.mid is None else _shape_of(call.mid, wanted.mid or ()))


def _shape_of(value: Any, otherwise: Shape) -> Shape:
    return tuple(value.shape) if isinstance(value, Tensor) else otherwise


def _is_of_dtypes(error: BaseException, told: Iterable[Symptom]) -> bool:
    if any(each.kind == "dtype" for each in told):
        return True
    return isinstance(error, (RuntimeError, TypeError)) and bool(_OF_DTYPES.search(str(error)))


def _is_no_tensor(call: Call, at_fault: set[str]) -> bool:
    if DOWNS in at_fault:
        return not isinstance(call.downs, Tensor) or not call.downs.dim()
    return not all(isinstance(each, Tensor) for each in (*(call.downs or ()), *(() if call.mid is None else (call.mid,))))
