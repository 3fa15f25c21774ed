"""The calls of a parity run, and the numbers of their inputs: drawn from a seed, the same for every side."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Input, ShapecheckError
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.inputs import controlled, controlnet_inputs
from shapecheck.models.safetensors import checkpoint_files

Emitted = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
"""A real ControlNet's residuals for the base inputs of a call, and a frame's number."""


_FIRST, _LAST = 11.3, 967.7
"""Timesteps are between these, a fraction each: one that is cut to a whole number is seen."""


_STEP = 173.0


_LOUD = 16.0
"""Perturbations in a half precision are this many times as large, or their effect would drown in its rounding."""


@dataclass(frozen=True, slots=True)
class Call:
    """One forward. Base inputs are the same in all calls of a geometry, every row of the batch another."""

    geometry: Geometry
    frame: int | None = None
    """Whose residuals are given; None for a ControlNet that is off: zeros."""
    half: bool = False
    """Whether the residuals are only in the first half of the batch, zeros in the second."""
    perturbed: str = ""
    """The input or slot whose perturbation is added, the same in every row."""
    pooled: bool = False
    """Whether each residual is one cell, as with guess mode or global pooling: PyTorch broadcasts it, files get it expanded."""

    def __str__(self) -> str:
        control = "off" if self.frame is None else "on in the first half" if self.half else f"on, frame {self.frame}"
        control += ", pooled residuals" if self.pooled else ""
        return f"{self.geometry}, control {control}" + (f", {self.perturbed} perturbed" if self.perturbed else "")


class Draws:
    """The inputs of calls. Without `emitted` residuals are drawn too, from a normal distribution of width 1."""

    def __init__(self, contract: Contract, seed: int, emitted: Emitted | None = None) -> None:
        self._contract, self._seed, self._emitted = contract, seed, emitted
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in contract.input_dtypes.items()}
        self._frames: dict[tuple[Geometry, int], dict[str, Tensor]] = {}

    def __call__(self, call: Call, *, expanded: bool = True) -> dict[str, Tensor]:
        """A tensor for every input and slot of the contract, in its dtype, on the CPU; pooled residuals `expanded` or 1×1."""
        geometry = call.geometry
        given = {each.name: self._base(each, geometry) for each in self._contract.inputs}
        given |= self._residuals(given, call)
        if call.pooled:
            given |= self._pooled(given, call.geometry, expanded)
        if call.perturbed:
            given[call.perturbed] = self.perturbed(call.perturbed, given[call.perturbed])
        return given

    def perturbed(self, name: str, value: Tensor) -> Tensor:
        """The value with the input's or slot's own perturbation added."""
        if name == "timestep":
            return ((value + _STEP) % 1000).to(value.dtype)
        if not value.is_floating_point():
            return (value + 1) % self._labels()
        noise = self._noise(f"perturb {name}", (1, *value.shape[1:])).expand(value.shape)
        if name == "time_ids":
            return (value.double() + 300 * noise.abs()).to(value.dtype)
        return (value.double() + noise * (_LOUD if value.dtype.itemsize < 4 else 1)).to(value.dtype)

    def _base(self, each: Input, geometry: Geometry) -> Tensor:
        shape, dtype = each.shape_at(geometry), self._dtypes[each.name]
        if each.name == "timestep":
            steps = torch.linspace(_FIRST, _LAST, shape[0] + 2, dtype=torch.float64)[1:-1]
            return steps.reshape(shape).to(dtype)
        if not dtype.is_floating_point:
            return (torch.arange(shape[0]) % self._labels()).reshape(shape).to(dtype)
        noise = self._noise(f"{each.name} {geometry}", shape)
        return (64 * (1 + noise.abs()).mul(4).floor() if each.name == "time_ids" else noise).to(dtype)

    def _labels(self) -> int:
        return int(self._contract.config.get("num_class_embeds") or 1000)

    def _residuals(self, base: Mapping[str, Tensor], call: Call) -> dict[str, Tensor]:
        shapes = self._contract.shapes(call.geometry)
        if call.frame is None or not shapes:
            return {name: torch.zeros(shape, dtype=self._dtypes[name]) for name, shape in shapes.items()}
        key = (call.geometry, call.frame)
        if key not in self._frames:
            self._frames[key] = self._drawn(base, call.geometry, call.frame)
        given = dict(self._frames[key])
        if call.half:
            rows = call.geometry.batch // 2
            given = {name: torch.cat([each[:rows], torch.zeros_like(each[rows:])]) for name, each in given.items()}
        return given

    def _pooled(self, given: Mapping[str, Tensor], geometry: Geometry, expanded: bool) -> dict[str, Tensor]:
        shapes = self._contract.shapes(geometry)
        cells = {name: given[name].double().mean((2, 3), keepdim=True).mul(4).to(given[name].dtype) for name in shapes}
        return {name: each.expand(shapes[name]) if expanded else each for name, each in cells.items()}

    def _drawn(self, base: Mapping[str, Tensor], geometry: Geometry, frame: int) -> dict[str, Tensor]:
        shapes = self._contract.shapes(geometry)
        if self._emitted is None:
            return {
                name: self._noise(f"{name} {geometry} frame {frame}", shape).to(self._dtypes[name])
                for name, shape in shapes.items()
            }
        given = {name: each.to(self._dtypes.get(name, each.dtype)) for name, each in self._emitted(base, frame).items()}
        self._contract.verify(given, geometry)
        refuse_zeros(given)
        return given

    def _noise(self, what: str, shape: tuple[int, ...]) -> Tensor:
        seed = zlib.crc32(f"{self._seed} {what}".encode())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refuse_zeros(residuals: Mapping[str, Tensor]) -> None:
    """Raise ShapecheckError where every residual is zero: with those, a slot that is not even connected passes."""
    if residuals and not any(bool(each.any()) for each in residuals.values()):
        raise ShapecheckError(
            "every residual is zero, so nothing would be proven: an untrained ControlNet has zero convolutions; "
            "give one with trained weights, or fill them with numbers"
        )


def emitted_by(name: str, *, variant: str | None = None, offline: bool = False) -> Emitted:
    """What the named ControlNet, in float32, gives for a random image a frame.

    Raises ShapecheckError where it, or its weights, cannot be had.
    """
    source = lookup.find(name, "controlnet", offline=offline)
    if source.folder is None or not checkpoint_files(source.folder, variant=variant):
        raise ShapecheckError(f"{source.origin} is a ControlNet without weights; give a folder that holds them")
    net: Any = diffusers_models.load(source, variant, torch.float32)
    inputs = controlnet_inputs(net.config, "float32")

    def emit(base: Mapping[str, Tensor], frame: int) -> dict[str, Tensor]:
        batch, _, height, width = base["sample"].shape
        sizes = {"batch": batch, "h": height, "w": width, "tokens": 1}
        generator = torch.Generator().manual_seed(frame)
        given = {}
        for each in inputs:
            if each.name in ("controlnet_cond", "control_type"):
                given[each.argument] = torch.rand([dim.at(sizes) for dim in each.shape], generator=generator)
            elif each.name in base:
                value = base[each.name]
                given[each.argument] = value.float() if value.is_floating_point() else value
            else:
                raise ShapecheckError(f"{name} takes {each.name}, which the UNet does not")
        with torch.inference_mode():
            downs, mid = net(**controlled(given), return_dict=False)
        return dict(zip(SHAPECHECK.names(len(downs)), (*downs, mid), strict=True))

    return emit
