"""Where a file's numbers leave PyTorch's: the first of the contract's own values that is further away than is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shapecheck.build.inner import Inner, inner_values
from shapecheck.build.marked import marked, output_name
from shapecheck.build.reproduce import reproduce
from shapecheck.contract import Contract
from shapecheck.contract.parity import Divergence
from shapecheck.contract.verdict import Verdict
from shapecheck.run.onnx_session import OnnxSession
from shapecheck.verify.metrics import compare

Source = Callable[[Sequence[Inner]], Mapping[str, Tensor]]
"""Gives values by `Inner.name`, float64 on the CPU, as `inner_of` does; loads the model first where it has to."""


Run = Callable[[bytes, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs the bytes of a marked model on inputs by the contract's names; gives outputs by the model's."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A value, and what PyTorch makes of it."""

    inner: Inner
    expected: Tensor
    own: float
    """The largest difference between PyTorch in the file's precision and in the reference's; NaN where it overflows."""


def first_divergence(
    path: Path,
    contract: Contract,
    names: Mapping[str, str],
    inputs: Mapping[str, Tensor],
    reference: Source,
    own: Source,
    *,
    times_own: float,
    dtype: torch.dtype,
    backend: str = "ort",
    run: Run | None = None,
    folder: Path | None = None,
) -> Divergence | None:
    """The first value, in the order in which the UNet computes them, that leaves tolerance; None where all agree.

    The file is run once with its values as outputs, in ONNX Runtime on `backend` or by `run`. That keeps it from fusing
    across them: a fault of a fused kernel may vanish. `names` is what the file calls the contract's inputs, of those it has;
    `inputs` holds a tensor for each, by the contract's names. `reference` and `own` give PyTorch's values in the reference's
    precision and in the file's, `dtype`; each is called once, one after the other. A value may differ by `times_own` times
    PyTorch's own largest difference, or by as many units of rounding (`torch.finfo(dtype).eps`) of its largest magnitude,
    whichever is more.
    Where `folder` is given, what Polygraphy needs to show the same is written there. Raises ShapecheckError where the file
    cannot be read or run.
    """
    values = inner_values(path, contract, names)
    expected = reference(values)
    cases = _cases(values, expected, own(values))
    found = _found(path, cases, inputs, run or in_onnx_runtime(path, names, backend))
    agreed: list[str] = []
    for case in cases:
        verdict = _verdict(case, found[case.inner.value], times_own, dtype)
        if not verdict.passes:
            feed = {names[name]: value for name, value in inputs.items() if name in names}
            output = {case.inner.value: case.expected}
            command = reproduce(path, feed, output, folder, allowed=verdict.allowed, backend=backend) if folder else ""
            return Divergence(case.inner.value, case.inner.module, _slot(contract, case.inner), verdict, tuple(agreed), command)
        agreed.append(case.inner.value)
    return None


def _cases(values: Sequence[Inner], expected: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[_Case]:
    """The values that PyTorch has."""
    known = [each for each in values if each.name in expected and each.name in own]
    return [_Case(each, expected[each.name], _largest(own[each.name] - expected[each.name])) for each in known]


def in_onnx_runtime(path: Path, names: Mapping[str, str], backend: str) -> Run:
    """Runs a marked copy of the file at `path`, whose weights stay where they are."""

    def run(model: bytes, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with OnnxSession.open(model, backend=backend, folder=path.parent) as session:
            return session({names[name]: value for name, value in inputs.items() if names.get(name) in session.inputs})

    return run


def _found(path: Path, cases: Sequence[_Case], inputs: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
    """The file's values, by their names in it."""
    values = [case.inner.value for case in cases]
    outputs = run(marked(path, values), inputs)
    return {value: outputs[output_name(value)] for value in values}


def _verdict(case: _Case, found: Tensor, times_own: float, dtype: torch.dtype) -> Verdict:
    rounding = torch.finfo(dtype).eps * _largest(case.expected)
    unit = rounding if case.own <= rounding else case.own  # which stays NaN where it is one, and fails
    return compare(found, case.expected, allowed=times_own * unit, own=case.own)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _slot(contract: Contract, inner: Inner) -> str:
    """The slot whose sum it is, or whose skip: the first, where two share it."""
    return inner.slot or next((slot.name for slot in contract.slots if slot.producer == inner.module), "")
