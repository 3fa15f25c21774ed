"""The forward calls of a parity run, and their inputs: drawn from a seed, the same for every backend."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Input, ShapecheckError, Slot
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.inputs import build_controlnet_arguments, controlnet_inputs
from shapecheck.models.safetensors import checkpoint_files
from shapecheck.parity.metrics import reference_device

EmitResiduals = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
"""Returns a real ControlNet's residuals for the base inputs of a call, and a frame's number."""
_FIRST_TIMESTEP, _LAST_TIMESTEP = 11.3, 967.7
"""Usual timesteps are between these, a fraction each: one that is cut to a whole number is seen."""
_SCHEDULE = (500.0, 980.0, 0.0, 999.0, 20.0, 1.0)
"""Timesteps of the calls whose rows differ: of the whole schedule, its ends among them."""
BOTH = 2
"""The frame of two ControlNets that are on: the sum of the residuals of frames 0 and 1."""
_STRONG = 6.0
"""The least width of a strong ControlNet's residuals; a tenth of the values is beyond ±8 then."""
_SIGMA_MAX = 14.6146
"""The width of latents as Euler-type schedulers of Stable Diffusion begin with them, before they are scaled."""
_OUTLIERS = 33.0, -28.0
"""Of two channels of the first token of each 77: CLIP ViT-L/14's, whatever the prompt."""
_OTHER_SCALE = 0.5
"""A ControlNet's conditioning_scale when it is perturbed."""
_VARIED_SCALES = (0.8, 1.9, 0.1, 1.3, 1.0)
"""The conditioning_scale of each call of varied rows, and first of usual calls: not 1, so that one that is baked is seen.
People turn control up beyond 1, and far down."""
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, their whole part left out, are spread evenly from 0 to 1 however many there are."""
_LOUD, _LOUD_TEXT = 16.0, 4.0
"""The usual width of a perturbation in a half precision: less would drown in rounding, and louder text has no smooth effect."""
OTHER_TIMES = (4.0, 1 / 4, 1 / 16)
"""Multiples of the usual perturbation to try where rounding blurs the effect of the usual one."""


@dataclass(frozen=True, slots=True)
class Row:
    """The inputs of one row of a batch."""

    timestep: float
    frames: tuple[int, ...] = ()
    """The frames whose residuals are added up, as those of the ControlNets that are on."""
    is_strong: bool = False
    """The residuals are a strong ControlNet's."""
    has_outliers: bool = False
    """The text has the outliers of a real encoder's."""
    is_noisy: bool = False
    """The latents are as wide as at an Euler-type scheduler's first step, unscaled."""


_KINDS = (
    Row(0, (0,)),
    Row(0, (1,), is_strong=True),
    Row(0, has_outliers=True),
    Row(0, (0, 1)),
    Row(0, (1,), has_outliers=True),
    Row(0, (0,), is_noisy=True),
)
"""The rows of the calls whose rows differ, apart from their timesteps."""


@dataclass(frozen=True, slots=True)
class ForwardCase:
    """One forward call. Base inputs are the same in all calls of a geometry but varied ones, every row of the batch another."""

    geometry: Geometry
    frame: int | None = None
    """The frame whose residuals are given; None for a ControlNet that is off: zeros."""
    half: bool = False
    """Residuals are only in the first half of the batch, zeros in the second."""
    perturbed: str = ""
    """The input or slot whose perturbation is added, the same in every row."""
    pooled: bool = False
    """Each residual is one cell, as with guess mode or global pooling: PyTorch broadcasts it, files get it expanded."""
    times: float = 1.0
    """The size of the perturbation, in usual ones."""
    varied: int | None = None
    """The number of a call each row of which is given something else, whatever `frame` is."""

    @property
    def unperturbed(self) -> ForwardCase:
        return replace(self, perturbed="", times=1.0)

    def __str__(self) -> str:
        if self.varied is not None:
            return f"{self.geometry}, varied rows {self.varied + 1}"
        frames = "frames 0 and 1" if self.frame == BOTH else f"frame {self.frame}"
        control = "off" if self.frame is None else "on in the first half" if self.half else f"on, {frames}"
        control += ", pooled residuals" if self.pooled else ""
        perturbed = f", {self.perturbed} perturbed" if self.perturbed else ""
        return f"{self.geometry}, control {control}{perturbed}" + (f" {self.times:g} times as much" if self.times != 1 else "")


def count_varied(batch: int) -> int:
    """Return how many calls of varied rows give every kind of row and every timestep, in another row each if there are many.

    A batch of 1 needs none for the first kind: it is the usual call.
    """
    return 5 if batch == 1 else 2 if batch >= 3 else 3


def list_rows(case: ForwardCase) -> tuple[Row, ...]:
    """Return what each row of a call is given."""
    batch = case.geometry.batch
    if case.varied is None:
        steps = torch.linspace(_FIRST_TIMESTEP, _LAST_TIMESTEP, batch + 2, dtype=torch.float64)[1:-1].tolist()
        frames = () if case.frame is None else (0, 1) if case.frame == BOTH else (case.frame,)
        on = batch // 2 if case.half else batch
        return tuple(Row(step, frames if row < on else ()) for row, step in enumerate(steps))
    first = case.varied + 1 if batch == 1 else 3 * case.varied if batch >= 3 else batch * case.varied
    # Where a row is of each kind in both calls, the second gives it another timestep, so that it shows which is at fault.
    shift = case.varied if batch > 3 else 0
    numbers = range(first, first + batch)
    return tuple(replace(_KINDS[at % 6], timestep=_SCHEDULE[(at - shift) % 6]) for at in numbers)


def residual_slots(contract: Contract) -> tuple[Slot, ...]:
    """Return the slots that are inputs of the model: a UNet's residuals and features, and none of a ControlNet."""
    return contract.residuals if contract.role == "unet" else ()


class InputGenerator:
    """Makes the inputs of forward calls.

    Residuals are those of `emit`, or normally distributed with a width of 1, as a T2I-Adapter's features always are.
    `strength` is one that a file holds: what PyTorch gets is multiplied by it.
    All is drawn once, on the CPU whatever the device, and kept where PyTorch's side runs: nobody may write into what is given.
    """

    def __init__(self, contract: Contract, seed: int, emit: EmitResiduals | None = None, strength: float = 1.0) -> None:
        self._strength = strength
        self._contract, self._seed, self._emit, self._slots = contract, seed, emit, residual_slots(contract)
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in contract.input_dtypes.items()}
        self._labels = int(contract.config.get("num_class_embeds") or 1000)
        self._base: dict[tuple[Geometry, int | None], dict[str, Tensor]] = {}
        self._frames: dict[tuple[Geometry, int | None, int | None], dict[str, Tensor]] = {}

    def __call__(self, case: ForwardCase, *, expanded: bool = True, before_strength: bool = False) -> dict[str, Tensor]:
        """Return a tensor for every input and slot, in its dtype; pooled residuals are `expanded` or 1×1.

        With `before_strength` residuals are what a file that holds the strength gets.
        """
        self._contract.require(case.geometry)
        key = case.geometry, case.varied
        if key not in self._base:
            base = {spec.name: self._draw_input(spec, case) for spec in self._contract.inputs}
            self._base[key] = {name: value.to(reference_device()) for name, value in base.items()}
        values = self._base[key] | self._draw_residuals(self._base[key], case)
        if case.pooled:
            for name, shape in self._contract.shapes(case.geometry).items():
                cell = values[name].double().mean((2, 3), keepdim=True).mul(4).to(values[name].dtype)
                values[name] = cell.expand(shape) if expanded else cell
        if case.perturbed:
            values[case.perturbed] = self.perturb(case.perturbed, values[case.perturbed], case.times)
        if self._strength != 1 and not before_strength:
            values |= {slot.name: values[slot.name] * self._strength for slot in self._contract.slots}
        return values

    def perturb(self, name: str, value: Tensor, times: float = 1.0) -> Tensor:
        """Add the perturbation of an input or slot to its value, `times` as large as it usually is."""
        if name == "timestep":
            return ((value + 173.0 * times) % 1000).to(value.dtype)
        if name == "conditioning_scale":
            return torch.full_like(value, _OTHER_SCALE)
        if not value.is_floating_point():
            return (value + max(1, int(times))) % self._labels
        noise = self._draw_noise(f"perturb {name}", (1, *value.shape[1:])).to(value.device).expand(value.shape)
        if name == "time_ids":
            return (value + 300 * times * noise.abs()).to(value.dtype)
        loud = _LOUD_TEXT if name == "encoder_hidden_states" else _LOUD
        return (value + noise * times * (loud if value.dtype.itemsize < 4 else 1)).to(value.dtype)

    def _draw_input(self, spec: Input, case: ForwardCase) -> Tensor:
        shape, dtype, rows = spec.shape_at(case.geometry), self._dtypes[spec.name], list_rows(case)
        if spec.name == "timestep":
            steps = [row.timestep for row in rows] if len(rows) == math.prod(shape) else [rows[0].timestep]  # one for all
            return torch.tensor(steps, dtype=torch.float64).reshape(shape).to(dtype)
        if spec.name == "conditioning_scale":
            return torch.full(shape, _VARIED_SCALES[case.varied or 0], dtype=dtype)
        if not dtype.is_floating_point:
            numbers = torch.arange(shape[0], dtype=torch.float64) + shape[0] * (case.varied or 0)
            # the last label first, which tables that are too short lack
            return (self._labels - 1 - (numbers * _GOLDEN % 1 * self._labels).long()).reshape(shape).to(dtype)
        noise = self._draw_noise(f"{spec.name} {_label(case)}", shape)
        for number, row in enumerate(rows):
            if spec.name == "encoder_hidden_states" and row.has_outliers:
                channels = noise.shape[-1] // 5, noise.shape[-1] - 1 - noise.shape[-1] // 5
                noise[number, ::USUAL_TOKENS, channels] = torch.tensor(_OUTLIERS)
            elif spec.name == "sample" and row.is_noisy:
                noise[number] *= _SIGMA_MAX
        return (64 * (1 + noise.abs()).mul(4).floor() if spec.name == "time_ids" else noise).to(dtype)

    def _draw_residuals(self, base: Mapping[str, Tensor], case: ForwardCase) -> dict[str, Tensor]:
        rows = list_rows(case)
        frames = {frame: self._keep_frame(base, case, frame) for frame in sorted({each for row in rows for each in row.frames})}
        values = {}
        for slot in self._slots:
            shape = slot.shape_at(case.geometry)
            total = torch.zeros(shape, dtype=self._dtypes[slot.name], device=reference_device())
            for number, row in enumerate(rows):
                for frame in row.frames:
                    total[number] += frames[frame][slot.name][number]
                if row.is_strong:
                    width = float(total[number].float().square().mean().sqrt())
                    total[number] *= max(1.0, _STRONG / width) if width > 0 else 1.0
            values[slot.name] = total
        return values

    def _keep_frame(self, base: Mapping[str, Tensor], case: ForwardCase, frame: int) -> dict[str, Tensor]:
        key = case.geometry, case.varied, frame
        if key not in self._frames:
            drawn = self._draw_frame(base, case, frame)
            self._frames[key] = {name: value.to(reference_device()) for name, value in drawn.items()}
        return self._frames[key]

    def _draw_frame(self, base: Mapping[str, Tensor], case: ForwardCase, frame: int) -> dict[str, Tensor]:
        shapes = {slot.name: slot.shape_at(case.geometry) for slot in self._slots}
        end = f"{_label(case)} frame {frame}"
        values = {name: self._draw_noise(f"{name} {end}", shape).to(self._dtypes[name]) for name, shape in shapes.items()}
        if self._emit is not None and shapes:
            emitted = self._emit({name: value.cpu() for name, value in base.items()}, frame)
            emitted = {name: value.to(self._dtypes.get(name, value.dtype)) for name, value in emitted.items()}
            self._contract.verify(emitted, case.geometry)
            refuse_zeros(emitted)
            values |= emitted
        return values

    def _draw_noise(self, label: str, shape: tuple[int, ...]) -> Tensor:
        seed = zlib.crc32(f"{self._seed} {label}".encode())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _label(case: ForwardCase) -> str:
    """Return what distinguishes the noise of a call from that of others."""
    return str(case.geometry) if case.varied is None else str(case)


def refuse_zeros(residuals: Mapping[str, Tensor]) -> None:
    """Raise ShapecheckError if every residual is zero: with such residuals a slot that is not even connected passes."""
    if residuals and not any(bool(value.any()) for value in residuals.values()):
        raise ShapecheckError(
            "every residual is zero, so nothing would be proven: an untrained ControlNet has zero convolutions; "
            "give one with trained weights, or fill them with numbers"
        )


def load_controlnet(name: str, *, offline: bool = False) -> EmitResiduals:
    """Return a function that runs the named ControlNet, in float32 where PyTorch's side runs, on a random image a frame.

    Raises ShapecheckError if it or its weights cannot be found.
    """
    source = lookup.find(name, "controlnet", offline=offline)
    if source.folder is None or not checkpoint_files(source.folder):
        raise ShapecheckError(f"{source.origin} is a ControlNet without weights; give a folder that holds them")
    net: Any = diffusers_models.load(source, None, torch.float32).to(reference_device())
    inputs = controlnet_inputs(net.config, "float32")

    def emit(base: Mapping[str, Tensor], frame: int) -> dict[str, Tensor]:
        batch, _, height, width = base["sample"].shape
        sizes = {"batch": batch, "h": height, "w": width, "tokens": 1}
        generator = torch.Generator().manual_seed(frame)
        arguments = {}
        for spec in inputs:
            if spec.name in ("controlnet_cond", "control_type"):
                arguments[spec.argument] = torch.rand([dim.at(sizes) for dim in spec.shape], generator=generator)
            elif spec.name in base:
                value = base[spec.name]
                arguments[spec.argument] = value.float() if value.is_floating_point() else value
            else:
                raise ShapecheckError(f"{name} takes {spec.name}, which the UNet does not")
        arguments = {name: value.to(reference_device()) for name, value in arguments.items()}
        with torch.inference_mode():
            downs, mid = net(**build_controlnet_arguments(arguments), return_dict=False)
        return dict(zip(SHAPECHECK.names(len(downs)), (*downs, mid), strict=True))

    return emit
