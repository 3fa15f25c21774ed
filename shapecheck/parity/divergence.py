"""The first of the contract's own values inside a file that is further from PyTorch's than is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.intermediate_values import Inner, add_outputs, find_values, name_output
from shapecheck.parity.metrics import compare
from shapecheck.parity.polygraphy_repro import reproduce
from shapecheck.parity.results import Divergence
from shapecheck.parity.runners import EXACT_OPTIONS
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.runtime.torch_session import TorchSession

Source = Callable[[Sequence[Inner]], Mapping[str, Tensor]]
"""Returns values by `Inner.name`, float64 on the CPU, as `compute_inner` does; loads the model first if it has to."""
RunMarked = Callable[[bytes, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs the bytes of a marked model on inputs by the contract's names; returns outputs by the model's."""


def find_divergence(
    file: OnnxFile,
    contract: Contract,
    names: Mapping[str, str],
    inputs: Mapping[str, Tensor],
    reference: Source,
    own: Source,
    *,
    tolerance_factor: float,
    dtype: torch.dtype,
    backend: str = "ort",
    run: RunMarked | None = None,
    folder: Path | None = None,
) -> Divergence | None:
    """Return the first value, in the order in which the UNet computes them, that leaves tolerance; None if all agree.

    The file is run once with its values as outputs, in ONNX Runtime on `backend` or by `run`. That keeps it from fusing
    across them: a fault of a fused kernel may vanish. `names` is what the file calls the contract's inputs, of those it has;
    `inputs` holds a tensor for each, by the contract's names. `reference` and `own` return PyTorch's values in the reference's
    precision and in the file's, `dtype`; each is called once, one after the other. A value may differ by `tolerance_factor`
    times PyTorch's own largest difference, or by as many units of rounding (`torch.finfo(dtype).eps`) of its largest magnitude,
    whichever is more.
    If `folder` is given, what Polygraphy needs to show the same is written there. Raises ShapecheckError if the file cannot be
    read or run.
    """
    values = find_values(file, contract, names)
    expected = reference(values)
    rounded = own(values)
    values = tuple(value for value in values if value.name in expected and value.name in rounded)
    outputs = (run or in_onnx_runtime(file.path, names, backend))(add_outputs(file, [value.value for value in values]), inputs)
    agreed: list[str] = []
    for value in values:
        error = _largest(rounded[value.name] - expected[value.name])
        rounding = torch.finfo(dtype).eps * _largest(expected[value.name])
        unit = rounding if error <= rounding else error  # which stays NaN if PyTorch itself overflows, and fails
        actual = outputs[name_output(value.value)]
        verdict = compare(actual, expected[value.name], allowed=tolerance_factor * unit, own=error)
        if not verdict.passes:
            command = ""
            if folder is not None:
                feed = {names[name]: tensor for name, tensor in inputs.items() if name in names}
                output = {value.value: expected[value.name]}
                command = reproduce(file, feed, output, folder, allowed=verdict.allowed, backend=backend)
            return Divergence(value.value, value.module, _find_slot(contract, value), verdict, tuple(agreed), command)
        agreed.append(value.value)
    return None


def compute_inner(
    module: nn.Module, contract: Contract, inputs: Mapping[str, Tensor], values: Iterable[Inner]
) -> dict[str, Tensor]:
    """Return the values by `Inner.name`, float64 on the CPU, computed in the precision of the module's weights.

    `inputs` holds a tensor for every input and slot of the contract. A value whose module does not exist here is left out.
    """
    computed: dict[str, Tensor] = {}
    modules = dict(module.named_modules())

    def keep_as(value: Inner) -> Callable[[Any, Any, Any], None]:
        features = [feature.name for feature in contract.features if feature.producer == value.module]
        added = [*features, value.slot] if value.slot else []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            total = output if isinstance(output, Tensor) else output[0]  # a tuple begins with the hidden state
            for name in added:
                total = total + inputs[name].to(total.device, total.dtype)  # rounded as the UNet's own sum is
            computed[value.name] = total.detach().to("cpu", torch.float64, copy=True)  # which later layers cannot write to

        return keep

    with ExitStack() as hooks:  # none remains, even if forward raises
        for value in values:
            if value.module in modules:
                hooks.callback(modules[value.module].register_forward_hook(keep_as(value)).remove)
        TorchSession(module, contract)(inputs)
    return computed


def in_onnx_runtime(path: Path, names: Mapping[str, str], backend: str) -> RunMarked:
    """Return a function that runs a marked copy of the file at `path`, whose weights stay where they are."""

    def run(model: bytes, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with OnnxSession.open(model, backend=backend, folder=path.parent, options=EXACT_OPTIONS.get(backend)) as session:
            known = {names[name]: value for name, value in inputs.items() if names.get(name) in session.inputs}
            return session({name: value.to(session.device) for name, value in known.items()})

    return run


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _find_slot(contract: Contract, inner: Inner) -> str:
    """Return the slot whose sum it is, or whose skip: the first, if two share it."""
    return inner.slot or next((slot.name for slot in contract.slots if slot.producer == inner.module), "")
