"""What comes by while a block is explained: the arguments of the UNet's calls, and what each ControlNet returned last."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from shapecheck.contract import ShapecheckError
from shapecheck.explain.traceback_calls import Traced
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.controlnet_emissions import Emission, watch_controlnet
from shapecheck.runtime.unet_call import Call, locate_arguments, read_call


class Returned(NamedTuple):
    """The residuals that a ControlNet returned, and which it is."""

    place: str
    """Where the ControlNet stands in what was given to be watched, as Python writes it; empty where it is the only one."""
    class_name: str
    residuals: Emission

    @property
    def name(self) -> str:
        """Class and place, for a sentence."""
        return f"{self.class_name}, {self.place}" if self.place else self.class_name


class Watched:
    """A UNet and the ControlNets beside it, each thread's calls apart from those of others.

    Raises ShapecheckError for what is no UNet, or no ControlNets.
    """

    def __init__(self, unet: nn.Module, controlnet: nn.Module | Sequence[nn.Module] | None) -> None:
        if not isinstance(unet, nn.Module):
            raise ShapecheckError(f"explained takes a UNet, not a {type(unet).__name__}; of a pipeline give pipeline.unet")
        self._unet = unet
        self._places = locate_arguments(unwrap_compiled(unet))
        self._controlnets: dict[nn.Module, str] = {}
        for place, module in _several(controlnet):
            self._controlnets.setdefault(module, place)
        self._calls: dict[int, tuple[Mapping[str, Any], Call]] = {}
        self._emitted: dict[tuple[int, int], Returned] = {}

    def install(self, hooks: ExitStack) -> None:
        """Set a hook on each; the stack removes those that are set, also where one of them cannot be."""
        # kept out of graphs that torch.compile makes, which would freeze what they saw when it was traced
        before, after = map(torch.compiler.disable, (self._before, self._after))
        hooks.callback(self._unet.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(self._unet.register_forward_hook(after).remove)
        for controlnet, place in self._controlnets.items():
            hooks.callback(watch_controlnet(controlnet, partial(self._receive, unwrap_compiled(controlnet), place)))

    def is_unet(self, module: nn.Module) -> bool:
        """Whether this is the watched UNet, or what torch.compile made of it."""
        return unwrap_compiled(module) is unwrap_compiled(self._unet)

    def call_of(self, traced: Traced) -> Call | None:
        """The arguments of this very call before it ran, in whichever thread; None where it was not seen."""
        return next((call for kwargs, call in list(self._calls.values()) if kwargs is traced.kwargs), None)

    def emissions(self) -> list[Returned]:
        """What each ControlNet returned last in each thread, the latest last."""
        return list(self._emitted.values())

    def emissions_of(self, modules: Sequence[nn.Module]) -> list[Returned]:
        """What these returned in this thread, up to the one that ran last, in their order; empty where any is not watched."""
        keys = [(threading.get_ident(), id(unwrap_compiled(each))) for each in modules]
        ran = [key for key in list(self._emitted) if key in keys]
        known = keys[: keys.index(ran[-1]) + 1] if ran else []
        return [self._emitted[key] for key in known] if all(key in self._emitted for key in known) else []

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read_call(self._places, args, kwargs)
        copied = call._replace(downs=_copied(call.downs), features=_copied(call.features))  # diffusers pops from lists
        self._calls[threading.get_ident()] = kwargs, copied

    def _after(self, *_: object) -> None:
        self._calls.pop(threading.get_ident(), None)

    def _receive(self, controlnet: nn.Module, place: str, emission: Emission) -> None:
        key = threading.get_ident(), id(controlnet)
        self._emitted.pop(key, None)  # so that the latest is last
        if emission:
            self._emitted[key] = Returned(place, type(controlnet).__name__, emission)


def _several(controlnet: Any) -> Iterator[tuple[str, nn.Module]]:
    """Each ControlNet by its place; those inside a MultiControlNetModel before it, since it returns what one alone does."""
    several = isinstance(controlnet, (list, tuple, nn.ModuleList))
    given = controlnet if several else () if controlnet is None else (controlnet,)
    for number, each in enumerate(given):
        if not isinstance(each, nn.Module):
            which = f"controlnet[{number}] is" if several else "controlnet is"
            raise ShapecheckError(
                f"explained takes a ControlNet, or several in a list or tuple; {which} a {type(each).__name__}; "
                "of a pipeline give pipeline.controlnet"
            )
        place = f"controlnet[{number}]" if several else "controlnet"
        inside = getattr(unwrap_compiled(each), "nets", None)
        if isinstance(inside, nn.ModuleList):
            yield from ((f"{place}.nets[{at}]", net) for at, net in enumerate(inside))
        yield place if several and len(given) > 1 else "", each


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, tuple) else value
