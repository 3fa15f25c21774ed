"""PyTorch's side of a parity run: the reference, and PyTorch's own error in the precision of the file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.observe.subject import Precision, TorchModel
from shapecheck.parity.cases import Call, Draws
from shapecheck.progress import Progress
from shapecheck.runtime.torch_session import OUTPUT, TorchSession

ASSUMED = 1e-6
"""PyTorch's own error, as a share of the largest value, where the reference has the precision of the file."""


@dataclass(frozen=True, slots=True)
class Sides:
    """PyTorch's images for the calls of a run."""

    precision: str
    """Of the reference."""
    reference: Mapping[Call, Tensor]
    """As float64 on the CPU."""
    images: Mapping[Call, Tensor]
    """In the precision of the file, as float64 on the CPU; empty where the reference has that precision."""
    shares: Mapping[Call, float]
    """PyTorch's own error in the precision of the file, in each of `images`, as a share of the reference's largest value."""
    least: float
    """The share below which no error counts: a rounding of that precision; `ASSUMED` where `images` is empty."""

    def own(self, call: Call) -> float:
        """PyTorch's own error in a call: what it is there, or the most where nothing is perturbed, whichever is more."""
        plain = [share for other, share in self.shares.items() if not other.perturbed]
        return max([self.shares.get(call, 0.0), *plain, self.least]) * self.scale(call)

    def scale(self, call: Call) -> float:
        """The largest magnitude of a call's image."""
        return float(self.reference[call].abs().max())


def computed(
    model: TorchModel,
    contract: Contract,
    calls: Sequence[Call],
    draws: Draws,
    wanted: Precision,
    look: Callable[[nn.Module], object],
    progress: Progress,
) -> Sides:
    """Every call in the reference precision and in that of the contract, one after the other.

    `look` is given the model in the contract's precision, while it is loaded.
    """
    own = contract.dtype
    precision = model.reference(wanted, contract.header.parameters or 0)

    def images(dtype: str) -> dict[Call, Tensor]:
        progress(f"loading the model in {dtype}")
        module = placed(model.load(dtype))
        if dtype == own:
            look(module)
        found = evaluate(module, contract, calls, draws, progress)
        del module
        gc.collect()
        return found

    reference = images(precision)
    if precision == own:
        return Sides(precision, reference, {}, {}, ASSUMED)
    rounded = images(own)
    shares = {call: float((rounded[call] - each).abs().max() / each.abs().max()) for call, each in reference.items()}
    return Sides(precision, reference, rounded, shares, torch.finfo(getattr(torch, own)).eps)


class Lazily:
    """The model in one precision, loaded when its first image is asked for."""

    def __init__(self, model: TorchModel, contract: Contract) -> None:
        self._model, self._contract = model, contract
        self._session: TorchSession | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The image for these inputs, as float64 on the CPU."""
        return self.session(inputs)[OUTPUT].double().cpu()

    @property
    def session(self) -> TorchSession:
        """The model, loaded."""
        if self._session is None:
            self._session = TorchSession(placed(self._model.load(self._contract.dtype)), self._contract)
        return self._session


def evaluate(
    module: nn.Module, contract: Contract, calls: Sequence[Call], draws: Draws, progress: Progress
) -> dict[Call, Tensor]:
    """The image of every call, as float64 on the CPU."""
    session, found = TorchSession(module, contract), {}
    step = f"computing with PyTorch in {str(session.dtype).removeprefix('torch.')}"
    for number, call in enumerate(calls):
        progress(f"{step}, call {number + 1} of {len(calls)}")
        found[call] = session(draws(call, expanded=False))[OUTPUT].double().cpu()
        if not torch.isfinite(found[call]).all():
            raise ShapecheckError(
                f"PyTorch's own image is not finite at {call}, in {step.rsplit(' ', 1)[1]}: nothing to compare"
            )
    return found


def placed(module: nn.Module) -> nn.Module:
    """On the GPU where there is one."""
    return module.to(device())


def device() -> str:
    """Where PyTorch's side runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"
