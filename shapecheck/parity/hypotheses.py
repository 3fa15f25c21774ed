"""Hypotheses why an output is not PyTorch's: each is tried in PyTorch, and told if the output is then the backend's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.contract.naming import is_feature
from shapecheck.parity.cases import ForwardCase, InputGenerator, residual_slots
from shapecheck.parity.metrics import compute_cosine, compute_strength, widen

Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""Returns PyTorch's output, in the precision of the file."""
_TRIALS, _PRECISE = 8, 1e-3
_ALIKE = 0.9
"""The least cosine between two changes of the output that are taken for one."""
_UNEXPLAINED = 0.4
"""A bound explains a change if no more of it than this share is left: where sums are cut off, inputs are not quite."""


_UNLIKE, _LEFT = 0.3, 0.05
"""What is left unexplained of a wrong output may be up to the first share in a half precision, the second in float32."""
_AKIN, _FIRST_SHARE, _LARGEST_SHARE, _FAR = 0.5, 0.95, 8.0, 4
"""A trial whose change has a lesser cosine leads nowhere, nor does a larger share of an input; of the bounds, which are sought
by halves, the first few may be far from the right one."""


class Hypothesis(NamedTuple):
    """Inputs that would explain a faulty output, and the fault in words, to follow the input's name."""

    fault: str
    inputs: dict[str, Tensor]


def suppose_of_slot(contract: Contract, generate: InputGenerator, case: ForwardCase) -> Iterator[Hypothesis]:
    """Yield the likely mistakes with one slot's residual."""
    off, name = generate(ForwardCase(case.geometry)), case.perturbed
    residual = generate(case)[name]
    # Slots of its own kind first: an adapter's last feature is added where the mid residual is, and both would explain it.
    for slot in sorted(residual_slots(contract), key=lambda slot: is_feature(slot.name) != is_feature(name)):
        if slot.name != name and off[slot.name].shape == residual.shape:
            yield Hypothesis(f"acts where {slot.name} belongs ({slot.producer})", off | {slot.name: residual})
    yield Hypothesis("acts with height and width exchanged", off | {name: transpose(residual)})
    yield Hypothesis("acts with its sign reversed", off | {name: -residual})


def suppose_of_rows(
    contract: Contract, generate: InputGenerator, case: ForwardCase, rows: Sequence[int]
) -> Iterator[Hypothesis]:
    """Yield the likely mistakes with some rows of a call."""
    inputs, slots = generate(case), residual_slots(contract)
    residuals = {slot.name: inputs[slot.name].clone() for slot in slots}
    for value in residuals.values():
        value[list(rows)] = 0
    yield Hypothesis("there the residuals have no effect", inputs | residuals)


def suppose_of_output(contract: Contract, generate: InputGenerator, case: ForwardCase) -> Iterator[Hypothesis]:
    """Yield the likely mistakes with a whole call."""
    inputs = generate(case)
    residuals = {slot.name: inputs[slot.name] for slot in residual_slots(contract)}
    if case.frame is not None:
        zeros = {name: torch.zeros_like(value) for name, value in residuals.items()}
        yield Hypothesis("the residuals have no effect", inputs | zeros)
        transposed = {name: transpose(value) for name, value in residuals.items()}
        yield Hypothesis("height and width of the residuals are exchanged", inputs | transposed)
        if case.geometry.batch > 1:
            swapped = {name: _swap_halves(value) for name, value in residuals.items()}
            yield Hypothesis("the halves of the residuals are exchanged", inputs | swapped)
    for spec in contract.inputs:
        value = inputs[spec.name]
        if case.geometry.batch > 1 and value.shape[:1] == (case.geometry.batch,):
            yield Hypothesis(f"the halves of {spec.name} are exchanged", inputs | {spec.name: _swap_halves(value)})
        if spec.name != "sample":
            yield Hypothesis(f"{spec.name} is taken as zeros", inputs | {spec.name: torch.zeros_like(value)})


def find_alike(hypotheses: Iterator[Hypothesis], compute: Compute, actual: Tensor, base: Tensor, actual_base: Tensor) -> str:
    """Return the hypothesis whose change of PyTorch's output `base` is most like the backend's change; empty if none is."""
    best, fault = 0.0, ""
    for hypothesis in hypotheses:
        cosine = compute_cosine(widen(compute(hypothesis.inputs)) - base, actual - actual_base)
        if cosine > best:  # which NaN is not
            best, fault = cosine, hypothesis.fault
    return f"{fault} (cosine {best:.3f})" if best >= _ALIKE else ""


def find_equal(hypotheses: Iterator[Hypothesis], compute: Compute, actual: Tensor, expected: Tensor, allowed: float) -> str:
    """Return the first hypothesis with which PyTorch computes the backend's output, as near as is allowed; empty if none does.

    One that hardly changes the `expected` output explains nothing.
    """
    for hypothesis in hypotheses:
        output = widen(compute(hypothesis.inputs))
        if output.shape == actual.shape and _max_distance(output, actual) <= 2 * allowed < _max_distance(output, expected):
            return hypothesis.fault
    return ""


def find_share(
    generate: InputGenerator, case: ForwardCase, compute: Compute, actual: Tensor, strength: float, allowed: float
) -> float | None:
    """Return the share of a perturbation with which PyTorch computes the backend's output; None if no share does.

    `strength` is the first guess. An effect is not proportional to what causes it, so it is refined by trial.
    """
    off, inputs = generate(ForwardCase(case.geometry)), generate(case)
    value, dtype = off[case.perturbed].double(), inputs[case.perturbed].dtype
    step = inputs[case.perturbed].double() - value
    change = actual - widen(compute(off))

    def compute_excess(share: float) -> tuple[float, Tensor]:
        output = widen(compute(off | {case.perturbed: (value + share * step).to(dtype)}))
        return float(change.flatten() @ (output - actual).flatten()) / float(change.flatten() @ change.flatten()), output

    before, share = 1.0, strength
    last, _ = compute_excess(before)
    for _ in range(_TRIALS):
        excess, output = compute_excess(share)
        if abs(excess) <= _PRECISE and _max_distance(output, actual) <= 2 * allowed:
            return share
        if not math.isfinite(excess) or excess == last:
            return None
        # the secant through the last two trials
        before, share, last = share, share - excess * (share - before) / (excess - last), excess
    return None


def find_cut(generate: InputGenerator, case: ForwardCase, compute: Compute, change: Tensor, strength: float) -> float | None:
    """Return the bound to which a perturbed input seems to be cut off: PyTorch's output then changes as the backend's did.

    `strength` is that of the backend's `change`: the bound is sought that gives it. None if none explains the change.
    """
    inputs = generate(case)
    value, base = inputs[case.perturbed], widen(compute(generate(case.unperturbed)))
    whole = widen(compute(inputs)) - base
    low, high = 0.0, float(value.abs().max())
    most, bound, found = 0.9 * high, high, whole
    for _ in range(_TRIALS):
        bound = (low + high) / 2
        found = widen(compute(inputs | {case.perturbed: value.clamp(-bound, bound)})) - base
        low, high = (bound, high) if compute_strength(found, whole) < strength else (low, bound)
    explains = float((found - change).norm()) <= _UNEXPLAINED * float((whole - change).norm())
    return bound if bound < most and explains else None


def find_distortion(inputs: Mapping[str, Tensor], name: str, compute: Compute, actual: Tensor, allowed: float) -> str:
    """Say what seems to happen to an input, with which PyTorch computes a faulty output; empty if nothing tried explains it.

    Tried are whole numbers in place of fractions, a share of the input, and a bound at which it is cut off.
    """
    value = inputs[name]
    if not value.is_floating_point():
        return ""
    base = widen(compute(inputs))
    change = actual - base
    # What rounding adds is far below what is allowed of its worst value.
    most = min(_UNLIKE * float(change.norm()), max(_LEFT * float(change.norm()), math.sqrt(change.numel()) * allowed / 4))

    def compute_change(other: Tensor) -> Tensor:
        return widen(compute({**inputs, name: other.to(value.dtype)})) - base

    whole = value.floor()
    if not torch.equal(whole, value) and float((compute_change(whole) - change).norm()) <= most:
        return "acts as if it were cut to whole numbers"
    if (share := _find_own_share(value, compute_change, change, most)) is not None:
        return f"acts as if {share:.2f} of it were given"
    bound = _find_own_cut(value, compute_change, change, most)
    return "" if bound is None else f"acts as if it were cut off at ±{bound:.2g}"


def _find_own_share(value: Tensor, compute_change: Callable[[Tensor], Tensor], change: Tensor, most: float) -> float | None:
    """Return the share of a value that changes the output as `change` does, but for `most` in length; None if none is found."""
    before, share, last = 1.0, _FIRST_SHARE, 0.0
    for _ in range(_TRIALS):
        found = compute_change(value * share)
        if float((found - change).norm()) <= most:
            return share
        along = compute_strength(found, change)
        if not abs(compute_cosine(found, change)) > _AKIN or along == last:
            return None
        # the secant through the last two trials
        before, share, last = share, share + (1 - along) * (share - before) / (along - last), along
        if not abs(share) <= _LARGEST_SHARE:
            return None
    return None


def _find_own_cut(value: Tensor, compute_change: Callable[[Tensor], Tensor], change: Tensor, most: float) -> float | None:
    """Return the bound to both sides of a value with which the output changes likewise; None if none is found."""
    low, high = 0.0, float(value.abs().max())
    for trial in range(2 * _TRIALS):
        bound = (low + high) / 2
        found = compute_change(value.clamp(-bound, bound))
        if float((found - change).norm()) <= most:
            return bound
        if trial >= _FAR and not compute_cosine(found, change) > _AKIN:
            return None
        low, high = (bound, high) if float(found.norm()) > float(change.norm()) else (low, bound)
    return None


def find_tokens(generate: InputGenerator, case: ForwardCase, compute: Compute, change: Tensor) -> str:
    """Say that the tokens after the first 77 do nothing, if the change of PyTorch's output without them is the backend's."""
    if case.geometry.tokens <= USUAL_TOKENS:
        return ""
    off, on = generate(case.unperturbed), generate(case)
    cut = [each | {case.perturbed: each[case.perturbed][:, :USUAL_TOKENS]} for each in (off, on)]
    without, whole = (widen(compute(after)) - widen(compute(before)) for before, after in (cut, (off, on)))
    likeness = compute_cosine(without, change)
    is_cut = likeness >= _ALIKE and likeness > compute_cosine(whole, change)
    return f"acts with its first {USUAL_TOKENS} tokens alone (cosine {likeness:.3f})" if is_cut else ""


def transpose(value: Tensor) -> Tensor:
    """Exchange height and width, and keep the shape."""
    return value.transpose(-2, -1).reshape(value.shape)


def _max_distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _swap_halves(value: Tensor) -> Tensor:
    return value.roll(value.shape[0] // 2, 0)
