"""PyTorch's side of a parity run: the reference, and PyTorch's own error in the precision of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.logs import silence_logger
from shapecheck.observe.subject import Precision, TorchModel
from shapecheck.parity.cases import OTHER_TIMES, ForwardCase, InputGenerator
from shapecheck.parity.metrics import compute_strength, reference_device, widen
from shapecheck.progress import Progress
from shapecheck.runtime.gpu import free_memory
from shapecheck.runtime.torch_session import OUTPUT, TorchSession, output_names

Outputs = dict[str, Tensor]
"""By the contract's names."""
ASSUMED_ERROR = 1e-6
"""PyTorch's own error, as a share of the largest value, if the reference has the precision of the file."""
_BLUR = 0.2
"""Rounding changes the strength of an effect by at most this share of its length beside the effect's, in all models tried."""
_CLEAR = 0.025
"""A perturbation whose effect's strength rounding changes by more than this is tried at other sizes."""


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """PyTorch's values of one output, for the calls of a run: on the CPU, each in the precision it was computed in."""

    precision: str
    """The precision of the reference."""
    reference: Mapping[ForwardCase, Tensor]
    rounded: Mapping[ForwardCase, Tensor]
    """The same in the precision of the file; empty if the reference has that precision."""
    shares: Mapping[ForwardCase, float]
    """PyTorch's own error in the precision of the file, for each of `rounded`, as a share of the reference's largest value."""
    least: float
    """The share below which no error counts: a rounding of that precision; `ASSUMED_ERROR` if `rounded` is empty."""
    row_share: float = 0.0
    """PyTorch's own largest error in a row of a call whose rows differ, as a share of that row's largest value."""
    _scales: dict[ForwardCase, float] = field(default_factory=dict)

    def torch_error(self, case: ForwardCase) -> float:
        """Return PyTorch's own error in a call: its error there, or the largest if nothing is perturbed, whichever is more."""
        return max(self.shares.get(case, 0.0), self._usual_share()) * self.scale(case)

    def row_error(self, case: ForwardCase, row: int) -> float:
        """Return the same for one row of a call: the largest share of all rows of varied calls, or of the usual calls.

        Its own error alone would be too little to go by: where rounding errs most is by chance.
        """
        share = max(self._usual_share(), self.row_share)
        return share * float(widen(self.reference[case][row]).abs().max())

    def _usual_share(self) -> float:
        usual = [share for case, share in self.shares.items() if not case.perturbed and case.varied is None]
        return max([*usual, self.least])

    def scale(self, case: ForwardCase) -> float:
        if case not in self._scales:
            self._scales[case] = float(self.reference[case].abs().max())
        return self._scales[case]

    def effect(self, case: ForwardCase) -> Tensor:
        """Return the change of the output by what is perturbed in a call, in float64."""
        return widen(self.reference[case]) - widen(self.reference[case.unperturbed])

    def blur(self, case: ForwardCase) -> float:
        """Return by how much PyTorch's own rounding may change the strength of an effect; infinity if there is no effect.

        It is the change that was seen, or what rounding of this length can be expected to make, whichever is more.
        """
        expected = self.effect(case)
        if case not in self.rounded or case.unperturbed not in self.rounded:
            # Of the rounding no more than its worst value is known: it is taken to be as long as that is large.
            largest = float(expected.abs().max())
            return _BLUR * self.torch_error(case) / largest if largest > 0 else math.inf
        found = widen(self.rounded[case]) - widen(self.rounded[case.unperturbed])
        length = float((found - expected).norm() / expected.norm())
        changes = _BLUR * length, abs(compute_strength(found, expected) - 1)
        return max(changes) if all(map(math.isfinite, changes)) else math.inf


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

    A perturbation whose effect is blurred by rounding is computed at other sizes too: `choose_call` chooses among them.
    `look` is given the model in the contract's precision, while it is loaded. Raises ShapecheckError if an output is not finite
    or zero everywhere: nothing can be compared with it.
    """
    is_half = torch.finfo(getattr(torch, contract.dtype)).bits < 32
    # Of the error of a half precision, float32's own is less than a hundredth.
    parameters = contract.header.parameters or 0
    precision = "float32" if is_half and requested == "auto" else model.choose_reference(requested, parameters)
    exact, rounded = dict[ForwardCase, Outputs](), dict[ForwardCase, Outputs]()
    unusable: dict[ForwardCase, str] = {}

    def compute(module: nn.Module, dtype: str, calls: Sequence[ForwardCase], computed: dict[ForwardCase, Outputs]) -> None:
        session = TorchSession(module, contract)
        for number, case in enumerate(calls, 1):
            progress(f"computing with PyTorch in {dtype}, call {number} of {len(calls)}: {case}")
            outputs = session(generate(case, expanded=False))
            computed[case] = {name: value.cpu() for name, value in outputs.items()}
            if why := _refuse(case, dtype, outputs):
                unusable[case] = why
                if not case.perturbed and case.varied is None:
                    raise ShapecheckError(why)

    def compute_both(calls: Sequence[ForwardCase]) -> dict[str, ReferenceOutputs]:
        progress(f"loading the model in {precision}")
        module = model.load(precision).to(reference_device())
        compute(module, precision, calls, exact)
        if precision != contract.dtype or model.calibration is not None:
            progress(f"casting the model to {contract.dtype}")
            with silence_logger("diffusers"):
                module.to(getattr(torch, contract.dtype))  # the weights as if loaded so, and never two models in memory
            look(module)
            model.round(module, contract)
            compute(module, contract.dtype, calls, rounded)
        else:
            look(module)
        del module
        free_memory()
        least = torch.finfo(getattr(torch, contract.dtype)).eps if rounded else ASSUMED_ERROR
        usable = [case for case in exact if case not in unusable]
        return {name: _select(name, precision, exact, rounded, usable, least) for name in output_names(contract)}

    found = compute_both(cases)
    if blurred := [case for case in cases if case.perturbed and _is_blurred(case, found)]:
        found = compute_both([replace(case, times=times) for case in blurred for times in OTHER_TIMES])
    if lost := [case for case in cases if case in unusable and case.perturbed and choose_call(case, found) is case]:
        raise ShapecheckError(unusable[lost[0]])
    return found


def _select(
    name: str,
    precision: str,
    exact: Mapping[ForwardCase, Outputs],
    rounded: Mapping[ForwardCase, Outputs],
    cases: Sequence[ForwardCase],
    least: float,
) -> ReferenceOutputs:
    """Return one output of these calls, and PyTorch's own error in each."""
    reference = {case: exact[case][name] for case in cases}
    values = {case: rounded[case][name] for case in cases if rounded}
    shares = {
        case: float((widen(value) - widen(reference[case])).abs().max() / widen(reference[case]).abs().max())
        for case, value in values.items()
    }
    varied = [measure_row_share(value, reference[case]) for case, value in values.items() if case.varied is not None]
    row_share = max(varied, default=0.0)
    return ReferenceOutputs(precision, reference, values, shares, least, row_share)


def measure_row_share(value: Tensor, expected: Tensor) -> float:
    """Return the largest error of a row as a share of its largest value; a row that is zero everywhere has no share."""
    errors, sizes = (widen(each).abs().flatten(1).amax(1) for each in (widen(value) - widen(expected), expected))
    shares = errors[sizes > 0] / sizes[sizes > 0]
    return float(shares.max()) if len(shares) else 0.0


def choose_call(case: ForwardCase, references: Mapping[str, ReferenceOutputs]) -> ForwardCase:
    """Return the call in which a perturbation shows best, of those that were computed and differ in its size alone."""
    computed = next(iter(references.values())).reference
    sizes = [other for other in computed if replace(other, times=1.0) == case]
    return min(sizes, key=lambda call: min(known.blur(call) for known in references.values()), default=case)


def _is_blurred(case: ForwardCase, references: Mapping[str, ReferenceOutputs]) -> bool:
    """Return whether a perturbation may show better at another size: one without any effect does not."""
    if any(case not in known.reference for known in references.values()):
        return True
    acts = any(known.rounded and bool(known.effect(case).any()) for known in references.values())
    return acts and not any(known.blur(case) <= _CLEAR for known in references.values())


def _refuse(case: ForwardCase, dtype: str, outputs: Outputs) -> str:
    """Say why nothing can be compared with PyTorch's outputs; empty if that is possible."""
    for name, value in outputs.items():
        if not torch.isfinite(value).all():
            noun = "image" if name == OUTPUT else name
            return f"PyTorch's own {noun} is not finite at {case}, in {dtype}: nothing to compare"
        if not value.any():
            noun = "image" if name == OUTPUT else name
            why = "so nothing can be compared; an untrained ControlNet?"
            return f"PyTorch's own {noun} is zero everywhere at {case}, in {dtype}, {why}"
    return ""


class LazyReference:
    """The model in one precision, loaded when its first outputs are requested."""

    def __init__(self, model: TorchModel, contract: Contract, progress: Progress) -> None:
        self._model, self._contract, self._progress = model, contract, progress
        self._session: TorchSession | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Return the outputs for these inputs, in float64."""
        if self._session is None:
            self._progress(f"loading the model in {self._contract.dtype}")
            module = self._model.load(self._contract.dtype).to(reference_device())
            self._model.round(module, self._contract)
            self._session = TorchSession(module, self._contract)
        return {name: widen(value) for name, value in self._session(inputs).items()}

    def close(self) -> None:
        self._session = None
        free_memory()
