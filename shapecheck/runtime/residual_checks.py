"""What is wrong with the residuals of one call, seen in the call itself: every fault as a mismatch that names its slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, ShapecheckError, Slot, show
from shapecheck.contract.mismatch import compare
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.runtime.unet_call import DOWNS, FEATURES, MID, Call

_LONE_MID = f"without {DOWNS} diffusers ignores all control: give both, or neither"


_LONE_DOWNS = (
    f"without {MID} diffusers takes the down residuals for T2I-Adapter features, adds them elsewhere and pops them from the "
    f"caller's list: give both, or give features as {FEATURES}"
)


_LONE_DOWNS_BESIDE_FEATURES = f"without {MID} diffusers ignores the down residuals: give both, or features alone"


EMPTIED = (
    "diffusers pops T2I-Adapter features from the caller's list, so that a later call finds less in it: "
    "give list(features) at each call"
)


class Shapes:
    """The shapes of all residuals at a geometry; dimensions that slots share are worked out once."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._dims = tuple(dict.fromkeys(dim for slot in slots for dim in slot.shape))
        self._picks = [itemgetter(*map(self._dims.index, slot.shape)) for slot in slots]

    def at(self, geometry: Geometry) -> list[Shape]:
        """In slot order, (batch, channels, height, width) each, in slot cells."""
        table = geometry.sizes
        sizes = [dim.at(table) for dim in self._dims]
        return [pick(sizes) for pick in self._picks]


def read_geometry(contract: Contract, sample: Any) -> Geometry | Mismatch:
    """The geometry that a sample shows, or what is wrong with the sample."""
    if not isinstance(sample, Tensor) or sample.dim() != 4:
        return Mismatch(
            "rank", "sample", describe_value(sample), "batch×channels×h×w", cause="it shows no size to check residuals against"
        )
    batch, _, height, width = sample.shape
    try:
        geometry = Geometry(batch, height, width)
        contract.require(geometry)
    except ShapecheckError as error:
        return Mismatch("size", "sample", tuple(sample.shape), "a size that the UNet takes", cause=str(error))
    return geometry


def find_feature_faults(features: Any, before: tuple[Any, int]) -> Iterator[Mismatch]:
    """What is wrong with T2I-Adapter features. `before` is the list of the last call that gave any, and its length then."""
    if features is None:
        return
    wanted = "a list with a feature for each down block"
    if not isinstance(features, list):
        yield Mismatch(
            "input",
            FEATURES,
            describe_value(features),
            wanted,
            cause="diffusers pops from it; give list(features) at each call",
        )
    elif not features or (features is before[0] and len(features) < before[1]):
        left = f"a list with {len(features)} left in it" if features else "an empty list"
        yield Mismatch("missing", FEATURES, left, wanted, cause=EMPTIED)


def find_residual_faults(contract: Contract, call: Call, geometry: Geometry, moved: bool) -> Iterator[Mismatch]:
    """What is wrong with residuals of which at least one side was given, in no order."""
    slots, mid = contract.slots, contract.slots[-1]
    given = {mid.name: call.mid}
    if isinstance(call.downs, (list, tuple)):
        given |= {SHAPECHECK.down(index): value for index, value in enumerate(call.downs)}
    else:
        slots = (mid,)
        yield _without_downs(contract, call, geometry)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in given.items() if value is not None and name not in tensors}
    yield from _no_tensors(contract, geometry, others)
    left = [slot for slot in slots if slot.name not in others]
    for each in compare(left, geometry, {name: tuple(value.shape) for name, value in tensors.items()}):
        if each.where == mid.name and each.kind == "missing":
            yield replace(each, cause=_LONE_DOWNS if call.features is None else _LONE_DOWNS_BESIDE_FEATURES)
        else:
            yield replace(each, cause=_cause(each))
    for slot in left:
        if slot.name in tensors:
            yield from _of_another_kind(slot, geometry, tensors[slot.name], call.sample, moved)


def _without_downs(contract: Contract, call: Call, geometry: Geometry) -> Mismatch:
    """The down residuals are absent, or no sequence."""
    *downs, mid = contract.slots
    if call.downs is None:
        beside = f"{len(downs)} down residuals beside it"
        return Mismatch("unused", mid.name, describe_value(call.mid), beside, geometry, mid.producer, cause=_LONE_MID)
    wanted = f"a list or tuple of {len(downs)} tensors, {downs[0].name} to {downs[-1].name}"
    cause = "diffusers adds what it yields item by item, in silence where that broadcasts"
    return Mismatch("input", DOWNS, describe_value(call.downs), wanted, geometry, cause=cause)


def _no_tensors(contract: Contract, geometry: Geometry, others: Mapping[str, Any]) -> Iterator[Mismatch]:
    slots = {slot.name: slot for slot in contract.slots}
    for name, value in others.items():
        if (slot := slots.get(name)) is None:
            yield Mismatch(
                "surplus", name, describe_value(value), "no such slot", geometry, cause="the UNet ignores it in silence"
            )
        else:
            cause = (
                "these are the keys of a ControlNetOutput: call MultiControlNetModel with return_dict=False"
                if isinstance(value, str)
                else "PyTorch broadcasts a number in silence"
            )
            yield Mismatch("input", name, describe_value(value), slot.shape_at(geometry), geometry, slot.producer, cause=cause)


def _cause(mismatch: Mismatch) -> str:
    """The cause of a mismatch of shapes, with a word on broadcasting where PyTorch would do that."""
    got, wanted = mismatch.observed, mismatch.expected
    if isinstance(got, str) or isinstance(wanted, str) or "silence" in mismatch.cause or len(got) > len(wanted):
        return mismatch.cause
    if all(size in (1, want) for size, want in zip(got[::-1], wanted[::-1], strict=False)):
        return "; ".join(filter(None, (mismatch.cause, "PyTorch broadcasts it in silence")))
    return mismatch.cause


def _of_another_kind(slot: Slot, geometry: Geometry, value: Tensor, sample: Tensor, moved: bool) -> Iterator[Mismatch]:
    """A dtype or a device that is not the sample's."""
    if value.dtype not in (sample.dtype, autocast_dtype(sample)):
        got, wanted = _short(value.dtype), _short(autocast_dtype(sample) or sample.dtype)
        cause = f"PyTorch promotes it in silence, or fails late, in an up block; give it with .to(torch.{wanted})"
        yield Mismatch("dtype", slot.name, got, wanted, geometry, slot.producer, cause=cause)
    if value.device != sample.device and not moved:
        place = f"one on {sample.device}, where the sample is"
        yield Mismatch("device", slot.name, f"a tensor on {value.device}", place, geometry, slot.producer)


def autocast_dtype(sample: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on the sample's device; None where it is off."""
    kind = sample.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def placed(contract: Contract, sample: Tensor, mismatch: Mismatch) -> Mismatch:
    """A mismatch of values, with the geometry and the UNet's module."""
    batch, _, height, width = sample.shape
    return replace(mismatch, geometry=Geometry(batch, height, width), unet_module=contract.slot(mismatch.where).producer)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_value(value: Any) -> str:
    """What was given, in words."""
    if value is None:
        return "nothing"
    return (
        f"a tensor of {show(tuple(value.shape))}" if isinstance(value, Tensor) else f"a {type(value).__name__}, {value!r:.40}"
    )
