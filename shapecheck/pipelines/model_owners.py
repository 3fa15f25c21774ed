"""Find where a pipeline or a stream keeps its UNet and its ControlNets, and put others there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.models.diffusers_models import is_controlnet, is_unet
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.dropin import DropIn

# From an attribute of a model that cannot be exchanged as it is to the advice.
_OBSTACLES = {
    "_hf_hook": "is moved between devices by a hook (enable_model_cpu_offload?): call pipe.remove_all_hooks()",
}
_PLACES = ("controlnet", "controlnets")
"""Attributes that hold one ControlNet, several in a MultiControlNetModel, or a list of them."""


def require_exchangeable(model: nn.Module, noun: str) -> None:
    """Raise ShapecheckError if something that another module would not have acts on this one."""
    original = unwrap_compiled(model)
    for name, advice in _OBSTACLES.items():
        if getattr(original, name, None):
            raise ShapecheckError(f"the {noun} {advice}")


def refuse_repeated(controlnets: Iterable[nn.Module]) -> None:
    """Raise ShapecheckError if one is there twice: its second call in a frame would write over the residuals of the first."""
    given = list(controlnets)
    if len(set(given)) != len(given):
        raise ShapecheckError(
            "own_outputs=False: one ControlNet is there twice, and writes over its own residuals: load it twice"
        )


class ModelOwners:
    """Everything that holds one UNet: a pipeline; a StreamDiffusion and the pipeline in it; a wrapper around those."""

    def __init__(self, pipe_or_stream: Any) -> None:
        """Find the owner. Raises ShapecheckError if nothing holds a UNet in PyTorch, or it cannot be exported as it is."""
        self._everybody = tuple(_walk_owners(pipe_or_stream))
        self._owners = tuple(owner for owner in self._everybody if isinstance(getattr(owner, "unet", None), nn.Module))
        if not self._owners:
            kind = type(pipe_or_stream).__name__
            raise ShapecheckError(f"{kind} holds no UNet: give a diffusers pipeline or a StreamDiffusion")
        self.unet: nn.Module = self._owners[0].unet
        if any(owner.unet is not self.unet for owner in self._owners):
            raise ShapecheckError("the stream and its pipeline hold two UNets; give the one whose UNet is to be exchanged")
        if isinstance(self.unet, DropIn):
            raise ShapecheckError("the UNet is exchanged already: call what accelerate returned, or put the PyTorch UNet back")
        original = unwrap_compiled(self.unet)
        if not is_unet(original):
            raise ShapecheckError(f"class {type(original).__name__} is not exported yet: expected a UNet2DConditionModel")
        require_exchangeable(self.unet, "UNet")

    @property
    def controlnets(self) -> tuple[nn.Module, ...]:
        """Return the ControlNets that run in PyTorch now, in the order of their residuals."""
        held = (net for owner in self._everybody for net, _ in _walk_controlnets(owner))
        return tuple(dict.fromkeys(net for net in held if is_controlnet(unwrap_compiled(net)) and not isinstance(net, DropIn)))

    def refuse_repeated_controlnets(self) -> None:
        """Raise ShapecheckError if somebody holds one ControlNet twice."""
        for owner in self._everybody:
            refuse_repeated(net for net, _ in _walk_controlnets(owner))

    @property
    def frame(self) -> tuple[int, int, int] | None:
        """Return width and height in pixels and the batch of every call, which a stream knows; None for a pipeline."""
        stream = next((owner for owner in self._owners if hasattr(owner, "trt_unet_batch_size")), None)
        return None if stream is None else (int(stream.width), int(stream.height), int(stream.trt_unet_batch_size))

    @property
    def vae(self) -> Any:
        """Return the VAE that decodes the pictures, or None: a stream's own comes before that of its pipeline."""
        return next((vae for owner in self._everybody if (vae := getattr(owner, "vae", None)) is not None), None)

    def replace_unet(self, old: nn.Module, new: nn.Module) -> bool:
        """Put a UNet wherever the old one still is, and return whether that was everywhere."""
        owners = [owner for owner in self._owners if owner.unet is old]
        for owner in owners:
            owner.unet = new
            # StreamDiffusion looks once which kind of UNet it calls, and remembers.
            if hasattr(owner, "_is_unet_tensorrt"):
                owner._is_unet_tensorrt = None
        return len(owners) == len(self._owners)

    def replace_controlnet(self, old: nn.Module, new: nn.Module) -> bool:
        """Put a ControlNet wherever the old one still is, and return whether that was anywhere."""
        places = [put for owner in self._everybody for net, put in _walk_controlnets(owner) if net is old]
        for put in places:
            put(new)
        return bool(places)

    def set_controlnets(self, given: Any, modules: Sequence[nn.Module]) -> None:
        """Put these modules where ControlNets are held, in the form of `given`: one, a MultiControlNetModel, or a list.

        Raises ShapecheckError, with nothing changed, if nobody holds ControlNets, or a list comes where one ControlNet is.
        """
        places = [(owner, name) for owner in self._everybody for name in _PLACES if getattr(owner, name, None) is not None]
        if not places:
            raise ShapecheckError("the pipeline holds no ControlNets: load one that takes them")
        forms = []
        for owner, name in places:
            held = getattr(owner, name)
            several = next((type(group) for group in (given, held) if hasattr(group, "nets")), None)
            if isinstance(held, (list, tuple)):
                several = list
            elif isinstance(given, nn.Module) and not hasattr(given, "nets"):
                several = None
            elif several is None:
                raise ShapecheckError("the pipeline holds one ControlNet: give several as a MultiControlNetModel")
            forms.append(several)
        for (owner, name), form in zip(places, forms, strict=True):
            setattr(owner, name, form(list(modules)) if form else modules[0])


def _walk_owners(start: Any) -> Iterator[Any]:
    """Yield an object, the StreamDiffusion in it if it is a wrapper, and the pipeline in that."""
    yield start
    for name in ("stream", "pipe"):
        inner = getattr(start, name, None)
        if inner is not None and not isinstance(inner, (nn.Module, str)):
            yield from _walk_owners(inner)


def _walk_controlnets(owner: Any) -> Iterator[tuple[nn.Module, Callable[[nn.Module], object]]]:
    """Yield each ControlNet that an owner holds itself, with what puts another one there."""
    for name in _PLACES:
        held = getattr(owner, name, None)
        nets = getattr(held, "nets", held)
        if isinstance(nets, (list, nn.ModuleList)):
            for index, net in enumerate(nets):
                yield net, partial(nets.__setitem__, index)
        elif isinstance(nets, nn.Module):
            yield nets, partial(setattr, owner, name)
