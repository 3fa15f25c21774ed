"""Frames to be timed: ControlNets and a UNet called on inputs that all backends share, with marks between the parts.

Models in PyTorch have random weights, which take as much time as any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from shapecheck.contract import Contract, Geometry
from shapecheck.logs import silence_logger
from shapecheck.models import diffusers_models
from shapecheck.models.config_file import ModelSource
from shapecheck.models.forward_call import build_arguments
from shapecheck.runtime.combine import combined
from shapecheck.runtime.dropin import DropIn


class Clock:
    """Marks along one frame. On a GPU they are CUDA events on the current stream, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._marks: list[Any] = []

    def begin(self) -> None:
        """Forget the last frame, once all that it left to do is done."""
        self._synchronize()
        self._marks.clear()

    def mark(self) -> None:
        """End a part and begin the next."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event: Any = torch.cuda.Event
        self._marks.append(event(enable_timing=True))
        self._marks[-1].record(torch.cuda.current_stream(self._device))

    def measure_parts(self) -> list[float]:
        """Return the milliseconds between the marks, once all is done."""
        self._synchronize()
        pairs = pairwise(self._marks)
        return [start.elapsed_time(end) if self._on_gpu else (end - start) * 1000 for start, end in pairs]

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)


PlayFrame = Callable[[Clock], None]
"""Plays one frame with five marks: its start, the end of the ControlNets, start and end of the UNet, and its own end."""


class _MarkedCall:
    """A UNet in PyTorch or a session that marks the start and the end of its calls."""

    def __init__(self, call: Any, clock: Clock) -> None:
        self._call, self._clock = call, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._clock.mark()
        outputs = self._call(*arguments, **options)
        self._clock.mark()
        return outputs


class FrameMaker:
    """Makes the frames of a UNet at one size on one device."""

    def __init__(self, contract: Contract, geometry: Geometry, device: torch.device, controlnets: int) -> None:
        """Build the models. Raises ShapecheckError if diffusers cannot build the UNet, or the ControlNet it implies."""
        self._contract, self._device = contract, device
        generator, dtypes = torch.Generator().manual_seed(0), contract.input_dtypes
        self._dtype: torch.dtype = getattr(torch, dtypes["sample"])
        tensors = {
            slot.name: torch.rand(slot.shape_at(geometry), generator=generator).to(device, getattr(torch, dtypes[slot.name]))
            for slot in contract.inputs
        }
        self._base = build_arguments(replace(contract, slots=()), tensors)
        factor = contract.header.vae_factor
        pixels = (geometry.batch, 3, geometry.height * factor, geometry.width * factor)
        self._image = torch.rand(pixels, generator=generator).to(device, self._dtype)
        self._nets = [self._fill(diffusers_models.derive_controlnet(self._build_unet())) for _ in range(controlnets)]

    @cached_property
    def torch_unet(self) -> nn.Module:
        """Return the UNet in PyTorch, made when a backend first needs it."""
        return self._fill(self._build_unet())

    def make_frame(self, unet: Any) -> PlayFrame:
        """Return a frame of a UNet in PyTorch, or of a session in its place."""
        session = unet.engine if isinstance(unet, DropIn) else None

        def play(clock: Clock) -> None:
            clock.mark()
            emitted = [net(**self._base, controlnet_cond=self._image, return_dict=False) for net in self._nets]
            clock.mark()
            downs, mid = combined(emitted) if emitted else (None, None)
            residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid} if emitted else {}
            called = unet
            # What a session's call does around its engine, such as checks, belongs to the hand-over.
            if session is None:
                called = _MarkedCall(unet, clock)
            else:
                unet.engine = _MarkedCall(session, clock)
            called(**self._base, **residuals, return_dict=False)
            clock.mark()

        return play

    def _build_unet(self) -> nn.Module:
        name = self._contract.class_name
        return diffusers_models.build(ModelSource(name, "the contract", name, self._contract.config.to_json()))

    def _fill(self, module: nn.Module) -> nn.Module:
        with silence_logger("diffusers"):
            module.to(self._dtype).to_empty(device=self._device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                # So small that nothing overflows in half precision.
                nn.init.normal_(tensor, std=0.02)
        return module.requires_grad_(False)
