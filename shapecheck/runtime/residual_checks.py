"""Find what is wrong with the residuals of one call in the call itself: every fault is a mismatch that names its slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError, Slot, show
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.runtime.call_gate import name_dtype
from shapecheck.runtime.unet_call import DOWNS, EMPTIED, FEATURES, LONE_DOWNS, LONE_MID, MID, Call


def read_geometry(contract: Contract, sample: Any) -> Geometry | Mismatch:
    """Return the geometry of a sample, or what is wrong with the sample."""
    if not isinstance(sample, Tensor) or sample.dim() != 4:
        cause = "it shows no size to check residuals against"
        return Mismatch("rank", "sample", describe_value(sample), "batch×channels×h×w", cause=cause)
    batch, _, height, width = sample.shape
    try:
        geometry = Geometry(batch, height, width)
        contract.require(geometry)
    except ShapecheckError as error:
        return Mismatch("size", "sample", tuple(sample.shape), "a size that the UNet takes", cause=str(error))
    return geometry


def find_feature_faults(features: Any, before: tuple[Any, int]) -> Iterator[Mismatch]:
    """Yield what is wrong with T2I-Adapter features. `before` is the last list of them, and its length then."""
    if features is None:
        return
    expected = "a list with a feature for each down block"
    if not isinstance(features, list):
        cause = "diffusers pops from it; give list(features) at each call"
        yield Mismatch("input", FEATURES, describe_value(features), expected, cause=cause)
    elif not features or (features is before[0] and len(features) < before[1]):
        left = f"a list with {len(features)} left in it" if features else "an empty list"
        yield Mismatch("missing", FEATURES, left, expected, cause=EMPTIED)


def find_residual_faults(contract: Contract, call: Call, geometry: Geometry, moved: bool) -> Iterator[Mismatch]:
    """Yield, in no order, what is wrong with residuals of which at least one side was passed.

    `moved`: accelerate's hooks move what a module is called with, so that any device is right.
    """
    *downs, mid = slots = contract.slots
    values = {mid.name: call.mid}
    if isinstance(call.downs, (list, tuple)):
        values |= {SHAPECHECK.down(index): value for index, value in enumerate(call.downs)}
    else:
        slots = (mid,)
        if call.downs is None:
            beside = f"{len(downs)} down residuals beside it"
            yield Mismatch("unused", mid.name, describe_value(call.mid), beside, geometry, mid.producer, cause=LONE_MID)
        else:
            expected = f"a list or tuple of {len(downs)} tensors, {downs[0].name} to {downs[-1].name}"
            cause = "diffusers adds what it yields item by item, in silence where that broadcasts"
            yield Mismatch("input", DOWNS, describe_value(call.downs), expected, geometry, cause=cause)

    by_name = {slot.name: slot for slot in contract.slots}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in values.items() if value is not None and name not in tensors}
    for name, value in others.items():
        observed = describe_value(value)
        if (known := by_name.get(name)) is None:
            yield Mismatch("surplus", name, observed, "no such slot", geometry, cause="the UNet ignores it in silence")
        else:
            cause = "PyTorch broadcasts a number in silence"
            if isinstance(value, str):
                cause = "these are the keys of a ControlNetOutput: call MultiControlNetModel with return_dict=False"
            yield Mismatch("input", name, observed, known.shape_at(geometry), geometry, known.producer, cause=cause)

    left = [slot for slot in slots if slot.name not in others]
    for mismatch in compare_shapes(left, geometry, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        cause = _explain_broadcast(mismatch)
        if mismatch.where == mid.name and mismatch.kind == "missing":
            beside_features = f"without {MID} diffusers ignores the down residuals: give both, or features alone"
            cause = LONE_DOWNS if call.features is None else beside_features
        yield replace(mismatch, cause=cause)
    for slot in left:
        if slot.name in tensors:
            yield from _compare_to_sample(slot, geometry, tensors[slot.name], call.sample, moved)


def _explain_broadcast(mismatch: Mismatch) -> str:
    """Return the cause of a mismatch of shapes, with a word on broadcasting if PyTorch would do that."""
    actual, expected = mismatch.observed, mismatch.expected
    if isinstance(actual, str) or isinstance(expected, str) or "silence" in mismatch.cause or len(actual) > len(expected):
        return mismatch.cause
    if all(size in (1, right) for size, right in zip(actual[::-1], expected[::-1], strict=False)):
        return "; ".join(filter(None, (mismatch.cause, "PyTorch broadcasts it in silence")))
    return mismatch.cause


def _compare_to_sample(slot: Slot, geometry: Geometry, value: Tensor, sample: Tensor, moved: bool) -> Iterator[Mismatch]:
    if value.dtype not in (sample.dtype, autocast_dtype(sample)):
        actual, expected = name_dtype(value.dtype), name_dtype(autocast_dtype(sample) or sample.dtype)
        cause = f"PyTorch promotes it in silence, or fails late, in an up block; give it with .to(torch.{expected})"
        yield Mismatch("dtype", slot.name, actual, expected, geometry, slot.producer, cause=cause)
    if value.device != sample.device and not moved:
        place = f"one on {sample.device}, where the sample is"
        yield Mismatch("device", slot.name, f"a tensor on {value.device}", place, geometry, slot.producer)


def autocast_dtype(sample: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes in on the sample's device, or None if it is off."""
    kind = sample.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def describe_value(value: Any) -> str:
    """Return what an argument is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        return f"a tensor of {show(tuple(value.shape))}"
    # A repr is made for what is short alone: that of a container of tensors waits for the GPU.
    return f"a {type(value).__name__}" + (f", {value!r:.40}" if isinstance(value, (str, int, float)) else "")
