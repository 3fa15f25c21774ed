"""Why an output is not PyTorch's: each hypothesis is tried in PyTorch, and told if that gives what the backend gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.contract.naming import is_feature
from shapecheck.parity.cases import ForwardCase, InputGenerator, residual_slots
from shapecheck.parity.metrics import cosine

Inputs = dict[str, Tensor]


Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""Returns PyTorch's output, in the precision of the file, as float64 on the CPU."""


_TRIALS, _PRECISE = 8, 1e-3


_ALIKE = 0.9
"""The least cosine between two changes of the output that are taken for one."""


class Hypothesis(NamedTuple):
    """Inputs that would give what a faulty backend gives, and what the fault then is, to go after the input's name."""

    fault: str
    inputs: Inputs


def suppose_of_slot(contract: Contract, generate: InputGenerator, case: ForwardCase) -> Iterator[Hypothesis]:
    """Yield what may have become of one slot's residual."""
    off, name = generate(ForwardCase(case.geometry)), case.perturbed
    residual = generate(case)[name]
    # those of its own kind first: an adapter's last feature is added where the mid residual is, and both would explain it
    for slot in sorted(residual_slots(contract), key=lambda slot: is_feature(slot.name) != is_feature(name)):
        if slot.name != name and off[slot.name].shape == residual.shape:
            yield Hypothesis(f"acts where {slot.name} belongs ({slot.producer})", off | {slot.name: residual})
    yield Hypothesis("acts with height and width exchanged", off | {name: transpose(residual)})


def suppose_of_output(contract: Contract, generate: InputGenerator, case: ForwardCase) -> Iterator[Hypothesis]:
    """Yield what may have become of a whole call."""
    given = generate(case)
    slots = [slot.name for slot in residual_slots(contract)]
    if case.frame is not None:
        off = {name: torch.zeros_like(given[name]) for name in slots}
        yield Hypothesis("the residuals have no effect", given | off)
        turned = {name: transpose(given[name]) for name in slots}
        yield Hypothesis("height and width of the residuals are exchanged", given | turned)
        if case.geometry.batch > 1:
            swapped = {name: _swap_halves(given[name]) for name in slots}
            yield Hypothesis("the halves of the residuals are exchanged", given | swapped)
    for spec in contract.inputs:
        value = given[spec.name]
        if case.geometry.batch > 1 and value.shape[:1] == (case.geometry.batch,):
            yield Hypothesis(f"the halves of {spec.name} are exchanged", given | {spec.name: _swap_halves(value)})
        if spec.name != "sample":
            yield Hypothesis(f"{spec.name} is taken as zeros", given | {spec.name: torch.zeros_like(value)})


def find_alike(hypotheses: Iterator[Hypothesis], compute: Compute, actual: Tensor, base: Tensor, actual_base: Tensor) -> str:
    """Return the hypothesis whose change of PyTorch's output `base` is most like the backend's change; empty if none is."""
    change = actual - actual_base
    best = max(
        ((cosine(compute(hypothesis.inputs) - base, change), hypothesis.fault) for hypothesis in hypotheses),
        key=lambda pair: -1.0 if pair[0] != pair[0] else pair[0],
        default=(0.0, ""),
    )
    return f"{best[1]} (cosine {best[0]:.3f})" if best[0] >= _ALIKE else ""


def find_equal(hypotheses: Iterator[Hypothesis], compute: Compute, actual: Tensor, expected: Tensor, allowed: float) -> str:
    """Return the first hypothesis under which PyTorch gives the backend's output, as near as is allowed; empty if none does.

    One that hardly changes the `expected` output explains nothing.
    """
    for hypothesis in hypotheses:
        output = compute(hypothesis.inputs)
        if output.shape == actual.shape and _distance(output, actual) <= 2 * allowed < _distance(output, expected):
            return hypothesis.fault
    return ""


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def find_share(
    generate: InputGenerator, case: ForwardCase, compute: Compute, actual: Tensor, strength: float, allowed: float
) -> float | None:
    """Return the share of a perturbation that, given to PyTorch, makes the backend's output; None if no share does.

    `strength` is the first guess. An effect is not proportional to what causes it, so it is refined by trial.
    """
    off, given = generate(ForwardCase(case.geometry)), generate(case)
    step = given[case.perturbed].double() - off[case.perturbed].double()
    change = actual - compute(off)

    def output(share: float) -> Tensor:
        value = off[case.perturbed].double() + share * step
        return compute(off | {case.perturbed: value.to(given[case.perturbed].dtype)})

    def excess(made: Tensor) -> float:
        return float(change.flatten() @ (made - actual).flatten()) / float(change.flatten() @ change.flatten())

    before, share = 1.0, strength
    last = excess(output(before))
    for _ in range(_TRIALS):
        made = output(share)
        now = excess(made)
        if abs(now) <= _PRECISE and _distance(made, actual) <= 2 * allowed:
            return share
        if not math.isfinite(now) or now == last:
            return None
        before, share, last = share, share - now * (share - before) / (now - last), now
    return None


def transpose(value: Tensor) -> Tensor:
    """Exchange height and width, in the shape it had."""
    return value.transpose(-2, -1).reshape(value.shape)


def _swap_halves(value: Tensor) -> Tensor:
    return value.roll(value.shape[0] // 2, 0)
