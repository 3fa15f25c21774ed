"""Find where a pipeline or a stream keeps its UNet, and put another one there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.models.diffusers_models import is_controlnet, is_unet
from shapecheck.runtime.dropin import DropIn

# From an attribute of a UNet that cannot be exported as it is to the advice.
_OBSTACLES = {
    "_hf_hook": "the UNet is moved between devices by a hook (enable_model_cpu_offload?): call pipe.remove_all_hooks()",
    "peft_config": "the UNet has a LoRA beside its weights: call pipe.fuse_lora() and pipe.unload_lora_weights()",
}


class UNetOwners:
    """Everything that holds one UNet: a pipeline; a StreamDiffusion and the pipeline in it; a wrapper around those."""

    def __init__(self, pipe_or_stream: Any) -> None:
        """Find the owner. Raises ShapecheckError if nothing holds a UNet in PyTorch, or it cannot be exported as it is."""
        owners = _walk_owners(pipe_or_stream)
        self._owners = tuple(owner for owner in owners if isinstance(getattr(owner, "unet", None), nn.Module))
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
        """Return the pipeline's ControlNets in PyTorch, or none if one of them is something else."""
        held = next((net for owner in self._owners if (net := getattr(owner, "controlnet", None)) is not None), None)
        nets = list(getattr(held, "nets", [] if held is None else [held]))
        return nets if all(is_controlnet(net) and not isinstance(net, DropIn) for net in nets) else []

    @property
    def frame(self) -> tuple[int, int, int] | None:
        """Return width and height in pixels and the batch of every call, which a stream knows; None for a pipeline."""
        stream = next((owner for owner in self._owners if hasattr(owner, "trt_unet_batch_size")), None)
        return None if stream is None else (int(stream.width), int(stream.height), int(stream.trt_unet_batch_size))

    def replace_unet(self, old: nn.Module, new: nn.Module) -> bool:
        """Put a UNet wherever the old one still is, and return whether that was everywhere."""
        owners = [owner for owner in self._owners if owner.unet is old]
        for owner in owners:
            owner.unet = new
            # StreamDiffusion looks once which kind of UNet it calls, and remembers.
            if hasattr(owner, "_is_unet_tensorrt"):
                owner._is_unet_tensorrt = None
        return len(owners) == len(self._owners)


def _walk_owners(start: Any) -> Iterator[Any]:
    """Yield an object, the StreamDiffusion in it if it is a wrapper, and the pipeline in that."""
    yield start
    for name in ("stream", "pipe"):
        inner = getattr(start, name, None)
        if inner is not None and not isinstance(inner, (nn.Module, str)):
            yield from _walk_owners(inner)
