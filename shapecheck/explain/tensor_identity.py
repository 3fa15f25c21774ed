"""Tell the mistake in the residuals of a call by the very tensors: they show an order and an origin that shapes cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from shapecheck.contract import Contract, Geometry, ShapecheckError, show
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.explain.call_log import EmissionRecord
from shapecheck.explain.judge_mapping import Judgement, Match, judge_residuals
from shapecheck.explain.residual_table import Fault, FaultKind, ResidualShapes, right_shapes
from shapecheck.runtime.unet_call import Call

_CHANGES: dict[FaultKind, str] = {
    "family": "take a ControlNet made for this UNet, or the UNet it was made for",
    "size": "give the ControlNet the UNet's latents, and an image of the size that is drawn",
    "batch": "give both the same batch: with classifier-free guidance the latents are doubled for both",
}


def judge_call(call: Call, contract: Contract, geometry: Geometry, emitted: Sequence[EmissionRecord]) -> Judgement | None:
    """Judge the residuals of a call. Returns None if not all of them are tensors."""
    downs = call.downs if isinstance(call.downs, (list, tuple)) else (None,)
    if not all(isinstance(residual, Tensor) for residual in (*downs, *(() if call.mid is None else (call.mid,)))):
        return None
    received = ResidualShapes(tuple(tuple(down.shape) for down in downs), None if call.mid is None else tuple(call.mid.shape))
    judgement = judge_residuals(received, (contract.header.source or "this UNet",), contract, geometry)
    flat = [*map(id, downs), id(call.mid)]
    whole = next((net for net in emitted if [*map(id, net.residuals.values())] == flat), None)
    if whole and judgement.mismatches:
        return replace(judgement, matches=(Match((_explain_origin(whole, judgement),), 0), *judgement.matches))
    touched = {SHAPECHECK.down(index) for index in _find_touched(downs, emitted)}
    if not touched or not judgement.matches:
        return judgement
    first, *others = judgement.matches
    # the tensors themselves are right, so that faults of one tensor come last
    moved_first = sorted(first.faults, key=lambda fault: fault.kind in ("width", "stride", "batch", "rank"))
    known = next((fault for fault in moved_first if set(fault.slots) == touched), None)
    return replace(judgement, matches=(replace(first, faults=(known,) if known else first.faults), *others))


def _find_touched(downs: Sequence[Tensor], emitted: Sequence[EmissionRecord]) -> set[int]:
    """Return the numbers of the down residuals that are left out, else given twice, else moved; none if others are given."""
    for emission in emitted:
        named = enumerate(emission.residuals.items())
        numbers = {id(residual): number for number, (name, residual) in named if name != SHAPECHECK.mid}
        order = [numbers[id(down)] for down in downs if id(down) in numbers]
        if not order or len(order) < len(downs):
            continue
        left_out = set(numbers.values()) - set(order)
        twice = {number for number in order if order.count(number) > 1}
        moved = {number for place, number in enumerate(order) if number != place}
        return left_out or twice or moved
    return set()


def _explain_origin(emission: EmissionRecord, judgement: Judgement) -> Fault:
    """Say what is wrong with a ControlNet whose residuals all arrive, in order, and do not fit."""
    received, geometry = judgement.received, judgement.geometry
    who = f"this ControlNet ({emission.name})"
    kind = _classify_difference(received, judgement.contract, geometry)
    if kind == "family":
        known = next((fault for match in judgement.matches for fault in match.faults if fault.kind == "family"), None)
        table = f": {known.message}" if known and known.residuals == received else ""
        return Fault("family", f"{who} is made for another UNet{table}", _CHANGES["family"], received)
    batch, _, *size = received.downs[0]
    latents = f"latents of {show(tuple(size))}" if kind == "size" else ""
    at = " and ".join(filter(None, (latents, f"batch {batch}" if batch != geometry.batch else "")))
    return Fault(kind, f"{who} ran at another {kind}: at {at}, the UNet at {geometry}", _CHANGES[kind], received)


def _classify_difference(received: ResidualShapes, contract: Contract, geometry: Geometry) -> FaultKind:
    """Return `family` for other channels, another number, or sizes that this UNet has at no latents; else `size` or `batch`."""
    right = right_shapes(contract, geometry)
    actual, expected = ((*table.downs, table.mid or ()) for table in (received, right))
    if [shape[1:2] for shape in actual] != [shape[1:2] for shape in expected] or any(len(shape) != 4 for shape in actual):
        return "family"
    if all(shape[2:] in ((1, 1), right_shape[2:]) for shape, right_shape in zip(actual, expected, strict=True)):
        return "batch"
    batch, _, height, width = actual[0]
    try:  # what fits the UNet at the latents that the first residual shows
        elsewhere = right_shapes(replace(contract, divisor=1), Geometry(batch, height, width))
    except (ShapecheckError, ValueError):  # a rounding that was never observed
        return "family"
    return "size" if elsewhere == received else "family"
