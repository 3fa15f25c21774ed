"""Where a pipeline or a stream keeps its UNet, and how another is put there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.models.diffusers_models import is_controlnet, is_unet
from shapecheck.runtime.dropin import DropIn

_WITHIN = ("stream", "pipe")
"""From a wrapper to its StreamDiffusion, and from that to its pipeline."""


_OBSTACLES = {
    "_hf_hook": "the UNet is moved between devices by a hook (enable_model_cpu_offload?): call pipe.remove_all_hooks()",
    "peft_config": "the UNet has a LoRA beside its weights: call pipe.fuse_lora() and pipe.unload_lora_weights()",
}
"""From an attribute of a UNet that cannot be exported as it is to what to do."""


class UNetOwners:
    """Everything that holds one UNet: a pipeline; a StreamDiffusion and the pipeline in it; a wrapper around those."""

    def __init__(self, pipe_or_stream: Any) -> None:
        """Raises ShapecheckError if nothing holds a UNet in PyTorch, or it cannot be exported as it is."""
        reached = tuple(_reach(pipe_or_stream))
        self._owners = tuple(owner for owner in reached if isinstance(getattr(owner, "unet", None), nn.Module))
        if not self._owners:
            kind = type(pipe_or_stream).__name__
            raise ShapecheckError(f"{kind} holds no UNet: give a diffusers pipeline or a StreamDiffusion")
        self.unet: nn.Module = self._owners[0].unet
        if any(owner.unet is not self.unet for owner in self._owners):
            raise ShapecheckError("the stream and its pipeline hold two UNets; give the one whose UNet is to be exchanged")
        if isinstance(self.unet, DropIn):
            raise ShapecheckError("the UNet is exchanged already: call what accelerate returned, or put the PyTorch UNet back")
        original = getattr(self.unet, "_orig_mod", self.unet)
        if not is_unet(original):
            raise ShapecheckError(f"class {type(original).__name__} is not exported yet: expected a UNet2DConditionModel")
        for name, advice in _OBSTACLES.items():
            if getattr(original, name, None):
                raise ShapecheckError(advice)

    @property
    def controlnets(self) -> list[nn.Module]:
        """Return the pipeline's ControlNets in PyTorch; none if it has none, or if one of them is something else."""
        held = next((net for owner in self._owners if (net := getattr(owner, "controlnet", None)) is not None), None)
        nets = list(getattr(held, "nets", [] if held is None else [held]))
        return nets if all(is_controlnet(net) and not isinstance(net, DropIn) for net in nets) else []

    @property
    def frame(self) -> tuple[int, int, int] | None:
        """Return width and height in pixels and the batch of every call, which a stream knows; None for a pipeline."""
        stream = next((owner for owner in self._owners if hasattr(owner, "trt_unet_batch_size")), None)
        return None if stream is None else (int(stream.width), int(stream.height), int(stream.trt_unet_batch_size))

    def put(self, unet: nn.Module, instead_of: nn.Module) -> bool:
        """Put a UNet wherever the other one still is. Returns whether that was everywhere."""
        holding = [owner for owner in self._owners if owner.unet is instead_of]
        for owner in holding:
            owner.unet = unet
            if hasattr(owner, "_is_unet_tensorrt"):
                owner._is_unet_tensorrt = None  # StreamDiffusion looks once what kind of UNet it calls, and remembers
        return len(holding) == len(self._owners)


def _reach(start: Any) -> Iterator[Any]:
    yield start
    for name in _WITHIN:
        inner = getattr(start, name, None)
        if inner is not None and not isinstance(inner, (nn.Module, str)):
            yield from _reach(inner)
