"""Frames to be timed: ControlNets and a UNet called on inputs that all backends share, with marks between the parts.

Models in PyTorch have random weights, which take as much time as any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from shapecheck.runtime.load import load


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


def compile_module(module: nn.Module, backend: str, settings: Mapping[str, Any] | None = None) -> Any:
    """Return a UNet, a ControlNet or a half of a VAE that this one of `COMPILED` compiles at its first call.

    The module itself may be changed. `settings` are those of `load`.
    """
    if backend == "torch-compile":
        return load(module, "torch-compile", **(settings or {}))
    laid_out: Any = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.compile(laid_out, mode="reduce-overhead", fullgraph=True)


def mark_step_begin() -> None:
    """Tell torch.compile that what its CUDA graphs returned before is no longer read."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def fill_randomly(module: nn.Module, dtype: torch.dtype, device: torch.device, *, seed: int) -> nn.Module:
    """Give a module that is on the meta device weights as it would have before training, the same for the same seed.

    A ControlNet's zero convolutions are filled too, so that it emits something.
    """
    with silence_logger("diffusers"):
        module.to(dtype).to_empty(device=device)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        drawn = set()
        for layer in module.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
                drawn |= {id(tensor) for tensor in layer.parameters(recurse=False)}
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and id(tensor) not in drawn:
                nn.init.normal_(tensor, std=0.02)
    return module.requires_grad_(False)


class FrameMaker:
    """Makes models in PyTorch, and frames of a UNet at one size on one device."""

    def __init__(
        self, contract: Contract, geometry: Geometry, device: torch.device, controlnets: Sequence[Contract | None]
    ) -> None:
        """Make the inputs; models are built when they are needed. None is the ControlNet that the UNet implies."""
        self._contract, self._device, self._controlnets = contract, device, controlnets
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

    @cached_property
    def torch_unet(self) -> nn.Module:
        """Return the UNet that eager PyTorch runs."""
        return self.build_unet()

    @cached_property
    def torch_controlnets(self) -> list[nn.Module]:
        """Return the ControlNets that eager PyTorch runs, beside its UNet or another backend's."""
        return self.build_controlnets()

    def build_unet(self) -> nn.Module:
        """Return a new UNet. Raises ShapecheckError if diffusers cannot build it."""
        return fill_randomly(_build_on_meta(self._contract), self._dtype, self._device, seed=0)

    def build_controlnets(self) -> list[nn.Module]:
        """Return new ControlNets. Raises ShapecheckError if diffusers cannot build one."""
        nets = [
            diffusers_models.derive_controlnet(_build_on_meta(self._contract)) if known is None else _build_on_meta(known)
            for known in self._controlnets
        ]
        return [fill_randomly(net, self._dtype, self._device, seed=number) for number, net in enumerate(nets, start=1)]

    def make_frame(self, unet: Any, controlnets: Sequence[Any] = (), *, graphs: bool = False) -> PlayFrame:
        """Return a frame of a UNet and ControlNets: in PyTorch, or sessions in their places.

        With `graphs` torch.compile replays CUDA graphs, whose outputs live until the next frame begins.
        """
        session = unet.engine if isinstance(unet, DropIn) else None

        def play(clock: Clock) -> None:
            if graphs:
                mark_step_begin()
            clock.mark()
            emitted = [net(**self._base, controlnet_cond=self._image, return_dict=False) for net in controlnets]
            clock.mark()
            # Pipelines hand over a single ControlNet's residuals as they are.
            downs, mid = (emitted[0] if len(emitted) == 1 else combined(emitted)) if emitted else (None, None)
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


def _build_on_meta(contract: Contract) -> nn.Module:
    name = contract.class_name
    return diffusers_models.build(ModelSource(name, "the contract", name, contract.config.to_json()))
