"""Check and time what candidates compute: frames of all ControlNets and the UNet, beside those of PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry
from shapecheck.contract.errors import one_line
from shapecheck.models.forward_call import build_arguments, unwrap_compiled
from shapecheck.observe.subject import measure_free_memory
from shapecheck.parity.cases import ForwardCase, InputGenerator
from shapecheck.parity.metrics import compare
from shapecheck.pipelines.candidates import Candidate, CandidateMaker
from shapecheck.pipelines.frame import Clock
from shapecheck.runtime.gpu import free_memory
from shapecheck.runtime.torch_session import forbid_tf32, output_names

_TOLERANCE = 4.0
"""Times PyTorch's own error in the same precision, as in a parity run."""
_ASSUMED = 4.0
"""Roundings of the precision that PyTorch's own error is taken for where it cannot be measured."""
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
_FEWEST, _MOST, _LONG_ENOUGH = 3, 10, 3.0
"""Frames of each that are timed: until there are enough of them, or these seconds are over."""
Models = tuple[nn.Module, tuple[nn.Module, ...]]
"""A UNet, and the ControlNets that run before it."""
Outputs = dict[str, Tensor]
"""Float64 on the CPU, by what they are in words."""


@dataclass(frozen=True, slots=True)
class Reference:
    """PyTorch's outputs in a wider precision, and its own largest error in that of the models, output by output."""

    precision: str
    expected: Mapping[str, Tensor]
    own: Mapping[str, float]
    tolerance: float = _TOLERANCE


class FrameInputs:
    """The inputs of one frame, which all candidates get: no two residuals and no two rows of a batch are the same."""

    def __init__(
        self,
        unet: Contract,
        controlnets: Sequence[Contract],
        geometry: Geometry,
        device: torch.device,
        dtype: torch.dtype,
        *,
        drawn: bool = True,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._unet, self._plain = unet, replace(unet, slots=())
        self._values = self._draw(unet, ForwardCase(geometry, 0 if unet.slots and drawn else None), seed=0)
        self._nets = [(net, self._draw(net, ForwardCase(geometry), seed=at)) for at, net in enumerate(controlnets, 1)]

    def compute_outputs(self, models: Models, dtype: torch.dtype | None = None) -> Outputs:
        """Return the image with control on and off, and every residual, of models in that precision or their own."""
        (unet, controlnets), computed = models, Outputs()
        cast = dtype or self._dtype
        for number, (net, (contract, values)) in enumerate(zip(controlnets, self._nets, strict=True), 1):
            downs, mid = self._call(net, contract, values, cast)
            for name, value in zip(output_names(contract), (*downs, mid), strict=True):
                computed[f"ControlNet {number}, {name}"] = value.double().cpu()
        for control, contract in (("on", self._unet), ("off", self._plain)):
            if contract.slots or control == "off":
                (image,) = self._call(unet, contract, self._values, cast)
                computed[f"the image with control {control}"] = image.double().cpu()
        return computed

    def play_frame(self, models: Models) -> None:
        """Run the ControlNets, sum their residuals as diffusers does, and run the UNet."""
        unet, controlnets = models
        total: list[Tensor] = []
        for net, (contract, values) in zip(controlnets, self._nets, strict=True):
            downs, mid = self._call(net, contract, values, self._dtype)
            emitted = [*downs, mid]
            total = [one + other for one, other in zip(total, emitted, strict=True)] if total else emitted
        if not total:
            self._call(unet, self._plain, self._values, self._dtype)
            return
        residuals = dict(zip((slot.name for slot in self._unet.residuals), total, strict=True))
        self._call(unet, self._unet, self._values | residuals, self._dtype)

    def _draw(self, contract: Contract, case: ForwardCase, *, seed: int) -> dict[str, Tensor]:
        return {name: value.to(self._device) for name, value in InputGenerator(contract, seed)(case).items()}

    @staticmethod
    def _call(module: nn.Module, contract: Contract, values: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        cast: dict[str, Any] = {
            name: value.to(dtype) if value.is_floating_point() and name != "timestep" else value
            for name, value in values.items()
        }
        if "conditioning_scale" in cast:  # a number, as pipelines give it
            cast["conditioning_scale"] = float(cast["conditioning_scale"])
        return module(**build_arguments(contract, cast), return_dict=False)


def make_inputs(
    maker: CandidateMaker, unet: nn.Module, controlnets: Sequence[nn.Module], geometry: Geometry, *, drawn: bool = True
) -> FrameInputs:
    """Return the inputs of a frame of these models; unless `drawn`, with zeros for residuals, where nobody looks at images."""
    first, contracts = next(unet.parameters()), [maker.find_contract(net) for net in controlnets]
    return FrameInputs(maker.find_contract(unet), contracts, geometry, first.device, first.dtype, drawn=drawn)


def get_models(candidate: Candidate) -> Models:
    """Return the modules of a candidate as a pipeline calls them."""
    return candidate.unet.module, tuple(part.module for part in candidate.controlnets)


def compute_reference(models: Models, inputs: FrameInputs) -> Reference:
    """Return what right outputs are: PyTorch's in a wider precision, on the same device.

    Where memory does not suffice, PyTorch's in their own precision, with twice the tolerance. The modules have their very own
    tensors again afterwards.
    """
    unet, controlnets = models
    originals: Models = unwrap_compiled(unet), tuple(map(unwrap_compiled, controlnets))
    dtype = next(originals[0].parameters()).dtype
    least = torch.finfo(dtype).eps
    with torch.no_grad():
        own_outputs = inputs.compute_outputs(originals)
        wide = _WIDER.get(dtype)
        try:
            if wide is None or not _has_room(originals, wide):
                raise torch.OutOfMemoryError
            with ExitStack() as stack:
                for model in (originals[0], *originals[1]):
                    stack.enter_context(_widen(model, wide))
                stack.enter_context(forbid_tf32())
                expected = inputs.compute_outputs(originals, wide)
        except torch.OutOfMemoryError:
            free_memory()
            assumed = {name: _ASSUMED * least * float(value.abs().max()) for name, value in own_outputs.items()}
            return Reference(str(dtype).removeprefix("torch."), own_outputs, assumed, 2 * _TOLERANCE)
    own = {
        name: max(float((own_outputs[name] - value).abs().max()), least * float(value.abs().max()))
        for name, value in expected.items()
    }
    return Reference(str(wide).removeprefix("torch."), expected, own)


def check_outputs(outputs: Outputs, reference: Reference, *, room: float = 1.0) -> tuple[bool, str]:
    """Return whether all outputs are right, and in words how far they are from PyTorch's, or which are wrong.

    `room` is how many times the usual tolerance is allowed, see `find_room`.
    """
    verdicts, tolerance = {}, room * reference.tolerance
    for name, expected in reference.expected.items():
        own = reference.own[name]
        verdicts[name] = compare(outputs[name], expected, allowed=tolerance * own, own=own)
    wrong = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.passes]
    if wrong:
        more = f"; and {len(wrong) - 1} more of {len(verdicts)} outputs" if len(wrong) > 1 else ""
        return False, one_line(f"wrong: {wrong[0]}{more}", longest=500)
    shares = [verdict.absolute.difference / verdict.own for verdict in verdicts.values() if verdict.absolute and verdict.own]
    worst = max(shares, default=0.0)
    return True, f"right: at most {worst:.1f} times PyTorch's own error, {tolerance:g} allowed"


def time_in_turns(candidates: Mapping[str, Models], inputs: FrameInputs, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of a frame of each: one of every candidate in turn, so that all share a disturbance."""
    clock = Clock(device)
    plays: dict[str, Callable[[], None]] = {name: partial(inputs.play_frame, models) for name, models in candidates.items()}
    measured: dict[str, list[float]] = {name: [] for name in plays}
    with torch.no_grad():
        for play in plays.values():
            for _ in range(2):
                play()
        start = time.monotonic()
        for number in range(_MOST):
            if number >= _FEWEST and time.monotonic() - start > _LONG_ENOUGH:
                break
            for name, play in plays.items():
                clock.begin()
                clock.mark()
                play()
                clock.mark()
                measured[name] += clock.measure_parts()
    return {name: statistics.median(times) for name, times in measured.items()}


def _has_room(models: Models, wide: torch.dtype) -> bool:
    """Return whether the CPU's memory has room for the wide weights; a GPU says so itself."""
    parameters = [parameter for model in (models[0], *models[1]) for parameter in model.parameters()]
    needed = sum(parameter.numel() for parameter in parameters) * wide.itemsize * 1.2
    return parameters[0].device.type != "cpu" or needed < measure_free_memory()


@contextmanager
def _widen(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give a model its weights in a wider precision, and afterwards the very tensors that it had, at their addresses."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
