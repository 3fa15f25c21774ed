"""What every backend's frames share when they are timed: inputs, ControlNets, and a UNet in PyTorch, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry
from shapecheck.contract.contract import dtypes_of
from shapecheck.models import diffusers_models
from shapecheck.models.forward_call import arguments
from shapecheck.models.lookup import ModelSource
from shapecheck.pipelines.clock import Clock, Marked
from shapecheck.progress import quiet
from shapecheck.runtime.combine import combined
from shapecheck.runtime.dropin import DropIn

Play = Callable[[Clock], None]
"""One frame. It marks its beginning, the end of the ControlNets, the beginning and end of the UNet, and its own end."""


_DEVIATION = 0.02
"""Of random weights: small enough that nothing overflows in half precision."""


class Stage:
    """A UNet's frames at one size on one device; weights are random, which cost as much time as any."""

    def __init__(self, contract: Contract, geometry: Geometry, device: torch.device, controlnets: int) -> None:
        """Raises ShapecheckError where diffusers cannot build the UNet, or the ControlNet it implies."""
        self._contract, self._device = contract, device
        draw, dtypes = torch.Generator().manual_seed(0), dtypes_of(contract)
        self._dtype: torch.dtype = getattr(torch, dtypes["sample"])
        base = {
            each.name: torch.rand(each.shape_at(geometry), generator=draw).to(device, getattr(torch, dtypes[each.name]))
            for each in contract.inputs
        }
        self._base = arguments(replace(contract, slots=()), base)
        factor = contract.header.vae_factor
        pixels = (geometry.batch, 3, geometry.height * factor, geometry.width * factor)
        self._image = torch.rand(pixels, generator=draw).to(device, self._dtype)
        self._nets = [self._filled(diffusers_models.implied_controlnet(self._skeleton())) for _ in range(controlnets)]

    def in_torch(self, *, compiled: bool) -> Play:
        """Frames with the UNet in PyTorch."""
        unet: Any = torch.compile(self._unet) if compiled else self._unet

        def play(clock: Clock) -> None:
            residuals = self._residuals(clock)
            clock.mark()
            unet(**self._base, **residuals, return_dict=False)
            clock.mark()
            clock.mark()

        return play

    def in_session(self, unet: DropIn) -> Play:
        """Frames with a session in the UNet's place, as `load` gives it."""
        session = unet.engine

        def play(clock: Clock) -> None:
            residuals = self._residuals(clock)
            unet.engine = Marked(session, clock)
            unet(**self._base, **residuals, return_dict=False)
            clock.mark()

        return play

    def _residuals(self, clock: Clock) -> dict[str, list[Tensor] | Tensor]:
        clock.mark()
        emitted = [net(**self._base, controlnet_cond=self._image, return_dict=False) for net in self._nets]
        clock.mark()
        if not emitted:
            return {}
        downs, mid = combined(emitted)
        return {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}

    @cached_property
    def _unet(self) -> nn.Module:
        return self._filled(self._skeleton())

    def _skeleton(self) -> nn.Module:
        """The UNet on the meta device."""
        name = self._contract.class_name
        return diffusers_models.build(ModelSource(name, "the contract", name, self._contract.config.to_json()))

    def _filled(self, module: nn.Module) -> nn.Module:
        with quiet("diffusers"):
            module.to(self._dtype).to_empty(device=self._device)
        for each in (*module.parameters(), *module.buffers()):
            if each.is_floating_point():
                nn.init.normal_(each, std=_DEVIATION)
        return module.requires_grad_(False)
