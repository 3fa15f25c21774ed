"""A record of what passes by while a block is explained: the arguments of the UNet's calls, and each ControlNet's output."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.explain.traceback_calls import FailedCall
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.controlnet_emissions import Emission, watch_controlnet
from shapecheck.runtime.unet_call import Call, locate_arguments, read_call


class EmissionRecord(NamedTuple):
    """The residuals that a ControlNet returned. Its place is written as in Python, controlnet[1]; empty for a single one."""

    place: str
    class_name: str
    residuals: Emission

    @property
    def name(self) -> str:
        """Class and place, for a sentence."""
        return f"{self.class_name}, {self.place}" if self.place else self.class_name


class CallLog:
    """A UNet and the ControlNets beside it, each thread's calls apart from those of others.

    Raises ShapecheckError for anything else than a UNet and ControlNets.
    """

    def __init__(self, unet: nn.Module, controlnet: nn.Module | Sequence[nn.Module] | None) -> None:
        if not isinstance(unet, nn.Module):
            raise ShapecheckError(f"explained takes a UNet, not a {type(unet).__name__}; of a pipeline give pipeline.unet")
        self._unet = unet
        self._places = locate_arguments(unwrap_compiled(unet))
        self._controlnets: dict[nn.Module, str] = {}
        several = isinstance(controlnet, (list, tuple, nn.ModuleList))
        modules: Any = controlnet if several else () if controlnet is None else (controlnet,)
        for number, module in enumerate(modules):
            place = f"controlnet[{number}]" if several else "controlnet"
            if not isinstance(module, nn.Module):
                raise ShapecheckError(
                    f"explained takes a ControlNet, or several in a list or tuple; {place} is a {type(module).__name__}; "
                    "of a pipeline give pipeline.controlnet"
                )
            # those inside a MultiControlNetModel come first: it may return the output of one
            inside = getattr(unwrap_compiled(module), "nets", None)
            for index, net in enumerate(inside if isinstance(inside, nn.ModuleList) else ()):
                self._controlnets.setdefault(net, f"{place}.nets[{index}]")
            self._controlnets.setdefault(module, place if several and len(modules) > 1 else "")
        self._calls: dict[int, tuple[Mapping[str, Any], Call]] = {}
        self._emissions: dict[tuple[int, int], EmissionRecord] = {}

    def install(self, hooks: ExitStack) -> None:
        """Set a hook on each; the stack removes those that are set, even if one of them cannot be."""
        # kept out of graphs that torch.compile makes, which would freeze what they saw when it was traced
        before, after = map(torch.compiler.disable, (self._before, self._after))
        hooks.callback(self._unet.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(self._unet.register_forward_hook(after).remove)
        for controlnet, place in self._controlnets.items():
            hooks.callback(watch_controlnet(controlnet, partial(self._receive, unwrap_compiled(controlnet), place)))

    def is_unet(self, module: nn.Module) -> bool:
        """Return whether this is the watched UNet, or what torch.compile made of it."""
        return unwrap_compiled(module) is unwrap_compiled(self._unet)

    def call_of(self, traced: FailedCall) -> Call | None:
        """Return the arguments of this very call before it ran, in whichever thread; None if it was not seen."""
        return next((call for kwargs, call in list(self._calls.values()) if kwargs is traced.kwargs), None)

    def emissions(self) -> list[EmissionRecord]:
        """Return the last emission of each ControlNet in each thread, the latest last."""
        return list(self._emissions.values())

    def emissions_of(self, modules: Sequence[nn.Module]) -> list[EmissionRecord]:
        """Return the emissions of these in this thread, in order, up to the one that ran last; none if one is unwatched."""
        keys = [(threading.get_ident(), id(unwrap_compiled(module))) for module in modules]
        ran = [key for key in list(self._emissions) if key in keys]
        known = keys[: keys.index(ran[-1]) + 1] if ran else []
        return [self._emissions[key] for key in known] if all(key in self._emissions for key in known) else []

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read_call(self._places, args, kwargs)
        # diffusers pops from lists, so that copies are kept
        copies = (type(value)(value) if type(value) in (list, tuple) else value for value in call)
        self._calls[threading.get_ident()] = kwargs, Call(*copies)

    def _after(self, *_: object) -> None:
        self._calls.pop(threading.get_ident(), None)

    def _receive(self, controlnet: nn.Module, place: str, emission: Emission) -> None:
        key = threading.get_ident(), id(controlnet)
        self._emissions.pop(key, None)  # so that the latest is last
        if emission:
            self._emissions[key] = EmissionRecord(place, type(controlnet).__name__, emission)
