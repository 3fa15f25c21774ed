"""Why an image is not PyTorch's: each suspicion is tried in PyTorch, and told where that gives what the backend gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.parity.cases import Call, Draws
from shapecheck.parity.metrics import cosine

Inputs = dict[str, Tensor]


Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""PyTorch's image, in the precision of the file, as float64 on the CPU."""


_TRIALS, _PRECISE = 8, 1e-3


_ALIKE = 0.9
"""The least cosine between two changes of the image that are taken for one."""


class Suspicion(NamedTuple):
    """Inputs that would give what a faulty backend gives, and what the fault then is, to go after the input's name."""

    fault: str
    inputs: Inputs


def of_slot(contract: Contract, draws: Draws, call: Call) -> Iterator[Suspicion]:
    """What may have become of one slot's residual."""
    off, name = draws(Call(call.geometry)), call.perturbed
    residual = draws(call)[name]
    for slot in contract.slots:
        if slot.name != name and off[slot.name].shape == residual.shape:
            yield Suspicion(f"acts where {slot.name} belongs ({slot.producer})", off | {slot.name: residual})
    yield Suspicion("acts with height and width exchanged", off | {name: transposed(residual)})


def of_image(contract: Contract, draws: Draws, call: Call) -> Iterator[Suspicion]:
    """What may have become of a whole call."""
    given = draws(call)
    slots = [slot.name for slot in contract.slots]
    if call.frame is not None:
        off = {name: torch.zeros_like(given[name]) for name in slots}
        yield Suspicion("the residuals have no effect", given | off)
        yield Suspicion(
            "height and width of the residuals are exchanged", given | {name: transposed(given[name]) for name in slots}
        )
        if call.geometry.batch > 1:
            yield Suspicion("the halves of the residuals are exchanged", given | {name: _halves(given[name]) for name in slots})
    for each in contract.inputs:
        if call.geometry.batch > 1 and given[each.name].shape[:1] == (call.geometry.batch,):
            yield Suspicion(f"the halves of {each.name} are exchanged", given | {each.name: _halves(given[each.name])})
        if each.name != "sample":
            yield Suspicion(f"{each.name} is taken as zeros", given | {each.name: torch.zeros_like(given[each.name])})


def alike(suspicions: Iterator[Suspicion], compute: Compute, found: Tensor, base: Tensor, found_base: Tensor) -> str:
    """The suspicion whose change of PyTorch's image `base` is most like the backend's change; empty where none is."""
    change = found - found_base
    best = max(
        ((cosine(compute(each.inputs) - base, change), each.fault) for each in suspicions),
        key=lambda pair: -1.0 if pair[0] != pair[0] else pair[0],
        default=(0.0, ""),
    )
    return f"{best[1]} (cosine {best[0]:.3f})" if best[0] >= _ALIKE else ""


def equal(suspicions: Iterator[Suspicion], compute: Compute, found: Tensor, expected: Tensor, allowed: float) -> str:
    """The first suspicion under which PyTorch gives the backend's image, as near as is allowed; empty where none does.

    One that hardly changes the `expected` image explains nothing.
    """
    for each in suspicions:
        image = compute(each.inputs)
        if image.shape == found.shape and _apart(image, found) <= 2 * allowed < _apart(image, expected):
            return each.fault
    return ""


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def share_of(draws: Draws, call: Call, compute: Compute, found: Tensor, strength: float, allowed: float) -> float | None:
    """The share of a perturbation that, given to PyTorch, makes the backend's image; None where no share does.

    `strength` is the first guess. An effect is not proportional to what causes it, so it is refined by trial.
    """
    off, given = draws(Call(call.geometry)), draws(call)
    step = given[call.perturbed].double() - off[call.perturbed].double()
    base = compute(off)
    change = found - base

    def image(share: float) -> Tensor:
        value = off[call.perturbed].double() + share * step
        return compute(off | {call.perturbed: value.to(given[call.perturbed].dtype)})

    def excess(made: Tensor) -> float:
        return float(change.flatten() @ (made - found).flatten()) / float(change.flatten() @ change.flatten())

    before, share = 1.0, strength
    last = excess(image(before))
    for _ in range(_TRIALS):
        made = image(share)
        now = excess(made)
        if abs(now) <= _PRECISE and _apart(made, found) <= 2 * allowed:
            return share
        if not math.isfinite(now) or now == last:
            return None
        before, share, last = share, share - now * (share - before) / (now - last), now
    return None


def transposed(value: Tensor) -> Tensor:
    """Height and width exchanged, in the shape it had."""
    return value.transpose(-2, -1).reshape(value.shape)


def _halves(value: Tensor) -> Tensor:
    return value.roll(value.shape[0] // 2, 0)
