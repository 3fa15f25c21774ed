"""Which mistake made the residuals of a call, told by the very tensors: they show an order and an origin that shapes cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from shapecheck.contract import Contract, Geometry, Shape, ShapecheckError, show
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.explain.call_log import Emission
from shapecheck.explain.fault import Fault, FaultKind
from shapecheck.explain.judge_mapping import Judgement, Match, judge_given
from shapecheck.explain.residual_table import Given, right
from shapecheck.runtime.unet_call import Call

_CHANGES: Mapping[FaultKind, str] = {
    "family": "take a ControlNet made for this UNet, or the UNet it was made for",
    "size": "give the ControlNet the UNet's latents, and an image of the size that is drawn",
    "batch": "give both the same batch: with classifier-free guidance the latents are doubled for both",
}


_OF_ONE: tuple[FaultKind, ...] = ("width", "stride", "batch", "rank")
"""Faults of a tensor in itself."""


def judged(call: Call, contract: Contract, geometry: Geometry, emitted: Sequence[Emission]) -> Judgement | None:
    """The judgement on these residuals; None where not all of them are tensors."""
    downs = call.downs if isinstance(call.downs, (list, tuple)) else (None,)
    if not all(isinstance(each, Tensor) for each in (*downs, *(() if call.mid is None else (call.mid,)))):
        return None
    given = Given(tuple(tuple(each.shape) for each in downs), None if call.mid is None else tuple(call.mid.shape))
    judgement = judge_given(given, (contract.header.source or "this UNet",), contract, geometry)
    whole = next((each for each in emitted if _are([*downs, call.mid], each.residuals)), None)
    if whole and judgement.mismatches:
        return replace(judgement, matches=(Match((_made_elsewhere(whole, judgement),), 0), *judgement.matches))
    touched = {SHAPECHECK.down(index) for index in _touched(downs, emitted)}
    if not touched or not judgement.matches:
        return judgement
    first, *others = judgement.matches
    moved_first = sorted(first.faults, key=lambda fault: fault.kind in _OF_ONE)  # the tensors themselves are right
    told = next((fault for fault in moved_first if set(fault.slots) == touched), None)
    return replace(judgement, matches=(replace(first, faults=(told,) if told else first.faults), *others))


def _are(given: Sequence[Tensor | None], emitted: Sequence[Tensor]) -> bool:
    return len(given) == len(emitted) and all(one is other for one, other in zip(given, emitted, strict=True))


def _touched(downs: Sequence[Tensor], emitted: Sequence[Emission]) -> set[int]:
    """Numbers of the down residuals that are left out, else given twice, else moved; none where these are other tensors."""
    for emission in emitted:
        numbers = {id(residual): number for number, residual in enumerate(emission.residuals[:-1])}
        order = [numbers[id(each)] for each in downs if id(each) in numbers]
        if not order or len(order) < len(downs):
            continue
        left_out = set(numbers.values()) - set(order)
        twice = {number for number in order if order.count(number) > 1}
        moved = {number for place, number in enumerate(order) if number != place}
        return left_out or twice or moved
    return set()


def _made_elsewhere(emission: Emission, judgement: Judgement) -> Fault:
    """What is wrong with a ControlNet whose residuals are given all and in order, and do not fit."""
    given, contract, geometry = judgement.given, judgement.contract, judgement.geometry
    who = f"this ControlNet ({emission.name})"
    differing = _differing(given, right(contract, geometry), _ran_at(given, contract))
    if differing == "family":
        known = next((fault for each in judgement.matches for fault in each.faults if fault.kind == "family"), None)
        of = f": {known.told}" if known and known.given == given else ""
        return Fault("family", f"{who} is made for another UNet{of}", _CHANGES["family"], given)
    batch, _, *size = given.downs[0]
    ran = f"latents of {show(tuple(size))}" if differing == "size" else ""
    at = " and ".join(filter(None, (ran, f"batch {batch}" if batch != geometry.batch else "")))
    told = f"{who} ran at another {differing}: at {at}, the UNet at {geometry}"
    return Fault(differing, told, _CHANGES[differing], given)


def _differing(given: Given, wanted: Given, elsewhere: Given | None) -> FaultKind:
    """Channels or number tell another UNet, and so do sizes that this one has at no latents; else size, or batch alone."""
    shapes, own = tuple(_flat(given)), tuple(_flat(wanted))
    if [each[1:2] for each in shapes] != [each[1:2] for each in own] or any(len(each) != 4 for each in shapes):
        return "family"
    if all(each[2:] in ((1, 1), mine[2:]) for each, mine in zip(shapes, own, strict=True)):
        return "batch"
    return "size" if elsewhere == given else "family"


def _flat(given: Given) -> Iterator[Shape]:
    yield from given.downs
    yield given.mid or ()


def _ran_at(given: Given, contract: Contract) -> Given | None:
    """What fits the UNet at the latents that the first residual shows."""
    first = given.downs[0] if given.downs else ()
    if len(first) != 4:
        return None
    try:
        return right(replace(contract, divisor=1), Geometry(first[0], first[2], first[3]))
    except (ShapecheckError, ValueError):  # a rounding that was never observed
        return None
