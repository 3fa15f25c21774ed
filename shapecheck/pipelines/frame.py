"""Frames to be timed: inputs, ControlNets and a UNet in PyTorch, which all backends share, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry
from shapecheck.models import diffusers_models
from shapecheck.models.forward_call import arguments
from shapecheck.models.lookup import ModelSource
from shapecheck.pipelines.clock import Clock, MarkedSession
from shapecheck.progress import quiet
from shapecheck.runtime.combine import combined
from shapecheck.runtime.dropin import DropIn

Play = Callable[[Clock], None]
"""Plays one frame. Marks its beginning, the end of the ControlNets, the beginning and end of the UNet, and its own end."""


_DEVIATION = 0.02
"""Of random weights, so that nothing overflows in half precision."""


class Stage:
    """The frames of a UNet at one size on one device. Random weights take as much time as any."""

    def __init__(self, contract: Contract, geometry: Geometry, device: torch.device, controlnets: int) -> None:
        """Raises ShapecheckError if diffusers cannot build the UNet, or the ControlNet it implies."""
        self._contract, self._device = contract, device
        draw, dtypes = torch.Generator().manual_seed(0), contract.input_dtypes
        self._dtype: torch.dtype = getattr(torch, dtypes["sample"])
        base = {
            given.name: torch.rand(given.shape_at(geometry), generator=draw).to(device, getattr(torch, dtypes[given.name]))
            for given in contract.inputs
        }
        self._base = arguments(replace(contract, slots=()), base)
        factor = contract.header.vae_factor
        pixels = (geometry.batch, 3, geometry.height * factor, geometry.width * factor)
        self._image = torch.rand(pixels, generator=draw).to(device, self._dtype)
        self._nets = [self._fill(diffusers_models.implied_controlnet(self._build_on_meta())) for _ in range(controlnets)]

    def play_in_torch(self, *, compiled: bool) -> Play:
        """Return what plays frames with the UNet in PyTorch."""
        unet: Any = torch.compile(self._unet) if compiled else self._unet

        def play(clock: Clock) -> None:
            residuals = self._run_controlnets(clock)
            clock.mark()
            unet(**self._base, **residuals, return_dict=False)
            clock.mark()
            clock.mark()

        return play

    def play_in_session(self, unet: DropIn) -> Play:
        """Return what plays frames with a session in the UNet's place."""
        session = unet.engine

        def play(clock: Clock) -> None:
            residuals = self._run_controlnets(clock)
            marked: Any = MarkedSession(session, clock)
            unet.engine = marked
            unet(**self._base, **residuals, return_dict=False)
            clock.mark()

        return play

    def _run_controlnets(self, clock: Clock) -> dict[str, list[Tensor] | Tensor]:
        clock.mark()
        emitted = [net(**self._base, controlnet_cond=self._image, return_dict=False) for net in self._nets]
        clock.mark()
        if not emitted:
            return {}
        downs, mid = combined(emitted)
        return {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}

    @cached_property
    def _unet(self) -> nn.Module:
        return self._fill(self._build_on_meta())

    def _build_on_meta(self) -> nn.Module:
        name = self._contract.class_name
        return diffusers_models.build(ModelSource(name, "the contract", name, self._contract.config.to_json()))

    def _fill(self, module: nn.Module) -> nn.Module:
        with quiet("diffusers"):
            module.to(self._dtype).to_empty(device=self._device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=_DEVIATION)
        return module.requires_grad_(False)
