"""Where a file's numbers leave PyTorch's: the first of the contract's own values that is further away than is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.intermediate_values import Inner, add_outputs, find_values, name_output
from shapecheck.parity.metrics import compare
from shapecheck.parity.polygraphy_repro import reproduce
from shapecheck.parity.results import Divergence, Verdict
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.runtime.torch_session import TorchSession

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
    file: OnnxFile,
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
    values = find_values(file, contract, names)
    expected = reference(values)
    cases = _cases(values, expected, own(values))
    found = _found(file, cases, inputs, run or in_onnx_runtime(file.path, names, backend))
    agreed: list[str] = []
    for case in cases:
        verdict = _verdict(case, found[case.inner.value], times_own, dtype)
        if not verdict.passes:
            feed = {names[name]: value for name, value in inputs.items() if name in names}
            output = {case.inner.value: case.expected}
            command = reproduce(file, feed, output, folder, allowed=verdict.allowed, backend=backend) if folder else ""
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


def _found(file: OnnxFile, cases: Sequence[_Case], inputs: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
    """The file's values, by their names in it."""
    values = [case.inner.value for case in cases]
    outputs = run(add_outputs(file, values), inputs)
    return {value: outputs[name_output(value)] for value in values}


def _verdict(case: _Case, found: Tensor, times_own: float, dtype: torch.dtype) -> Verdict:
    rounding = torch.finfo(dtype).eps * _largest(case.expected)
    unit = rounding if case.own <= rounding else case.own  # which stays NaN where it is one, and fails
    return compare(found, case.expected, allowed=times_own * unit, own=case.own)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _slot(contract: Contract, inner: Inner) -> str:
    """The slot whose sum it is, or whose skip: the first, where two share it."""
    return inner.slot or next((slot.name for slot in contract.slots if slot.producer == inner.module), "")


def inner_of(module: nn.Module, contract: Contract, inputs: Mapping[str, Tensor], values: Iterable[Inner]) -> dict[str, Tensor]:
    """The values by `Inner.name`, float64 on the CPU, computed in the precision of the module's weights.

    `inputs` holds a tensor for every input and slot of the contract. A value whose module does not exist here is left out.
    """
    found: dict[str, Tensor] = {}
    with _watched(module, values, inputs, found):
        TorchSession(module, contract)(inputs)
    return found


@contextmanager
def _watched(
    module: nn.Module, values: Iterable[Inner], inputs: Mapping[str, Tensor], found: dict[str, Tensor]
) -> Iterator[None]:
    """Keep the values as they are computed; no hook remains, even where forward raises."""
    modules = dict(module.named_modules())
    with ExitStack() as hooks:
        for each in values:
            if each.module in modules:
                handle = modules[each.module].register_forward_hook(_keeper(each, inputs, found))
                hooks.callback(handle.remove)
        yield


def _keeper(each: Inner, inputs: Mapping[str, Tensor], found: dict[str, Tensor]) -> Callable[[Any, Any, Any], None]:
    def keep(module: nn.Module, given: Any, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]  # a tuple begins with the hidden state
        if each.slot:
            value = value + inputs[each.slot].to(value.device, value.dtype)  # rounded as the UNet's own sum is
        found[each.name] = value.detach().to("cpu", torch.float64, copy=True)  # which later layers cannot write to

    return keep
