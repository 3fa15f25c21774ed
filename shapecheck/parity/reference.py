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
    """What PyTorch gives as one output, for the calls of a run."""

    precision: str
    """Of the reference."""
    reference: Mapping[ForwardCase, Tensor]
    """As float64 on the CPU."""
    rounded: Mapping[ForwardCase, Tensor]
    """In the precision of the file, as float64 on the CPU; empty if the reference has that precision."""
    shares: Mapping[ForwardCase, float]
    """PyTorch's own error in the precision of the file, for each of `rounded`, as a share of the reference's largest value."""
    least: float
    """The share below which no error counts: a rounding of that precision; `ASSUMED_ERROR` if `rounded` is empty."""

    def torch_error(self, case: ForwardCase) -> float:
        """Return PyTorch's own error in a call: what it is there, or the most if nothing is perturbed, whichever is more."""
        plain = [share for other, share in self.shares.items() if not other.perturbed]
        return max([self.shares.get(case, 0.0), *plain, self.least]) * self.scale(case)

    def scale(self, case: ForwardCase) -> float:
        """Return the largest magnitude of a call's output."""
        return float(self.reference[case].abs().max())


def compute_reference(
    model: TorchModel,
    contract: Contract,
    cases: Sequence[ForwardCase],
    generate: InputGenerator,
    wanted: Precision,
    look: Callable[[nn.Module], object],
    progress: Progress,
) -> dict[str, ReferenceOutputs]:
    """Compute every call in the reference precision and in that of the contract, one after the other; return it by output.

    `look` is given the model in the contract's precision, while it is loaded.
    """
    own = contract.dtype
    precision = model.choose_reference(wanted, contract.header.parameters or 0)

    def compute(dtype: str) -> dict[ForwardCase, Outputs]:
        progress(f"loading the model in {dtype}")
        module = to_device(model.load(dtype))
        if dtype == own:
            look(module)
        found = _compute_cases(module, contract, cases, generate, progress)
        del module
        gc.collect()
        return found

    exact = compute(precision)
    rounded = compute(own) if precision != own else {}
    least = torch.finfo(getattr(torch, own)).eps if rounded else ASSUMED_ERROR

    def select(name: str) -> ReferenceOutputs:
        reference = {case: outputs[name] for case, outputs in exact.items()}
        images = {case: outputs[name] for case, outputs in rounded.items()}
        shares = {
            case: float((image - reference[case]).abs().max() / reference[case].abs().max()) for case, image in images.items()
        }
        return ReferenceOutputs(precision, reference, images, shares, least)

    return {name: select(name) for name in output_names(contract)}


class LazyReference:
    """The model in one precision, loaded when its first outputs are asked for."""

    def __init__(self, model: TorchModel, contract: Contract) -> None:
        self._model, self._contract = model, contract
        self._session: TorchSession | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Return the outputs for these inputs, as float64 on the CPU."""
        if self._session is None:
            module = to_device(self._model.load(self._contract.dtype))
            self._session = TorchSession(module, self._contract)
        return {name: value.double().cpu() for name, value in self._session(inputs).items()}

    def close(self) -> None:
        """Give the memory back."""
        self._session = None
        gc.collect()


def _compute_cases(
    module: nn.Module, contract: Contract, cases: Sequence[ForwardCase], generate: InputGenerator, progress: Progress
) -> dict[ForwardCase, Outputs]:
    """Return the outputs of every call, as float64 on the CPU; raise ShapecheckError if nothing can be compared with one."""
    session, found = TorchSession(module, contract), {}
    precision = str(session.dtype).removeprefix("torch.")
    for number, case in enumerate(cases):
        progress(f"computing with PyTorch in {precision}, call {number + 1} of {len(cases)}")
        outputs = session(generate(case, expanded=False))
        found[case] = {name: value.double().cpu() for name, value in outputs.items()}
        for name, value in found[case].items():
            what = "image" if name == OUTPUT else name
            if not torch.isfinite(value).all():
                raise ShapecheckError(f"PyTorch's own {what} is not finite at {case}, in {precision}: nothing to compare")
            if not value.any():
                raise ShapecheckError(
                    f"PyTorch's own {what} is zero everywhere, so nothing can be compared; an untrained ControlNet?"
                )
    return found


def to_device(module: nn.Module) -> nn.Module:
    """Move a module to the GPU if there is one."""
    return module.to(reference_device())


def reference_device() -> str:
    """Return where PyTorch's side runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"
