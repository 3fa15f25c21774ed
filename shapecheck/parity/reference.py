"""PyTorch's side of a parity run: the reference, and PyTorch's own error in the precision of the file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.observe.subject import Precision, TorchModel
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.progress import Progress
from shapecheck.runtime.torch_session import OUTPUT, TorchSession, output_names

Outputs = dict[str, Tensor]
"""By the contract's names."""
ASSUMED_ERROR = 1e-6
"""PyTorch's own error, as a share of the largest value, if the reference has the precision of the file."""


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """PyTorch's values of one output, for the calls of a run: float64 on the CPU."""

    precision: str
    """The precision of the reference."""
    reference: Mapping[ForwardCase, Tensor]
    rounded: Mapping[ForwardCase, Tensor]
    """The same in the precision of the file; empty if the reference has that precision."""
    shares: Mapping[ForwardCase, float]
    """PyTorch's own error in the precision of the file, for each of `rounded`, as a share of the reference's largest value."""
    least: float
    """The share below which no error counts: a rounding of that precision; `ASSUMED_ERROR` if `rounded` is empty."""

    def torch_error(self, case: ForwardCase) -> float:
        """Return PyTorch's own error in a call: its error there, or the largest if nothing is perturbed, whichever is more."""
        plain = [share for other, share in self.shares.items() if not other.perturbed]
        return max([self.shares.get(case, 0.0), *plain, self.least]) * self.scale(case)

    def scale(self, case: ForwardCase) -> float:
        return float(self.reference[case].abs().max())


def compute_reference(
    model: TorchModel,
    contract: Contract,
    cases: Sequence[ForwardCase],
    generate: InputGenerator,
    requested: Precision,
    look: Callable[[nn.Module], object],
    progress: Progress,
) -> dict[str, ReferenceOutputs]:
    """Compute every call in the reference precision and in that of the contract, one after the other; return it by output.

    `look` is given the model in the contract's precision, while it is loaded. Raises ShapecheckError if an output is not finite
    or zero everywhere: nothing can be compared with it.
    """
    precision = model.choose_reference(requested, contract.header.parameters or 0)

    def compute(dtype: str) -> dict[ForwardCase, Outputs]:
        progress(f"loading the model in {dtype}")
        module = model.load(dtype).to(reference_device())
        if dtype == contract.dtype:
            look(module)
        session, computed = TorchSession(module, contract), {}
        for number, case in enumerate(cases):
            progress(f"computing with PyTorch in {dtype}, call {number + 1} of {len(cases)}")
            outputs = session(generate(case, expanded=False))
            computed[case] = {name: value.double().cpu() for name, value in outputs.items()}
            for name, value in computed[case].items():
                noun = "image" if name == OUTPUT else name
                if not torch.isfinite(value).all():
                    raise ShapecheckError(f"PyTorch's own {noun} is not finite at {case}, in {dtype}: nothing to compare")
                if not value.any():
                    where = f"{case}, in {dtype}"
                    why = "so nothing can be compared; an untrained ControlNet?"
                    raise ShapecheckError(f"PyTorch's own {noun} is zero everywhere at {where}, {why}")
        del module, session
        gc.collect()
        return computed

    exact = compute(precision)
    rounded = compute(contract.dtype) if precision != contract.dtype else {}
    least = torch.finfo(getattr(torch, contract.dtype)).eps if rounded else ASSUMED_ERROR

    def select(name: str) -> ReferenceOutputs:
        reference = {case: outputs[name] for case, outputs in exact.items()}
        values = {case: outputs[name] for case, outputs in rounded.items()}
        shares = {
            case: float((value - reference[case]).abs().max() / reference[case].abs().max()) for case, value in values.items()
        }
        return ReferenceOutputs(precision, reference, values, shares, least)

    return {name: select(name) for name in output_names(contract)}


class LazyReference:
    """The model in one precision, loaded when its first outputs are requested."""

    def __init__(self, model: TorchModel, contract: Contract) -> None:
        self._model, self._contract = model, contract
        self._session: TorchSession | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Return the outputs for these inputs, as float64 on the CPU."""
        if self._session is None:
            self._session = TorchSession(self._model.load(self._contract.dtype).to(reference_device()), self._contract)
        return {name: value.double().cpu() for name, value in self._session(inputs).items()}

    def close(self) -> None:
        self._session = None
        gc.collect()


def reference_device() -> str:
    """Return the device on which PyTorch's side runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"
