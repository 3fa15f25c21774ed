"""Watching a run: what the ControlNets emit, what reaches the UNet, and every add that consumes it.

Module hooks see what goes in and out of modules. The adds are written inside a forward, between modules, so a dispatch
mode watches the operations themselves and follows each residual to the add that takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from shapecheck.contract import Geometry
from shapecheck.observe.residual_tracer import Arrived, Emitted, ResidualTracer, Summed, dtype_name, tensors_in
from shapecheck.observe.trace import Arrival, Group, Residual, Trace

MID = -1
"""Index of the mid residual."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What the UNet was called with."""

    geometry: Geometry
    emitted: tuple[Residual, ...]
    arrived: tuple[Arrival, ...]


class Recorder:
    """Collects a Trace for every call of the UNet made while it is active."""

    def __init__(self, unet: nn.Module) -> None:
        self.traces: list[Trace] = []
        self.follower = ResidualTracer({id(module): path for path, module in unet.named_modules()})
        self._emitted: list[Residual] = []
        self._call: _Call | None = None

    def take_emitted(self) -> tuple[Residual, ...]:
        """What ControlNets and adapters emitted since the last UNet call."""
        emitted, self._emitted = tuple(self._emitted), []
        return emitted

    def remember_maker(self, path: str, output: Any) -> None:
        """A module that returns one tensor made it, unless a module around it returns the same."""
        if (tensor := _only_tensor(output)) is not None:
            self.follower.makers[tensor] = path

    def controlnet_returned(self, number: int, output: Any) -> None:
        """ControlNet `number` emitted its residuals."""
        for index, tensor in _residuals(*_downs_and_mid(output)):
            self._was_emitted(number, index, tensor, "control")

    def adapter_returned(self, number: int, output: Any) -> None:
        """T2I-Adapter `number`, counted after the ControlNets, emitted its features."""
        for index, tensor in _residuals(output, None):
            self._was_emitted(number, index, tensor, "feature")

    def unet_called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The UNet received its arguments."""
        sample, text, downs, mid, features = (_argument(name, at, args, kwargs) for name, at in _ARGUMENTS)
        tokens = text.shape[1] if isinstance(text, Tensor) and text.dim() == 3 else 77
        geometry = Geometry(sample.shape[0], sample.shape[-2], sample.shape[-1], tokens)
        given: list[tuple[Group, int, Tensor]] = [("control", *each) for each in _residuals(downs, mid)]
        given += [("feature", *each) for each in _residuals(features, None)]
        self._call = _Call(geometry, self.take_emitted(), tuple(self._arrival(*each) for each in given))
        for _, _, tensor in given:
            self.follower.tags[tensor] = Arrived(tuple((group, index) for group, index, other in given if other is tensor))
        self.follower.enter()

    def module_called(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The first module that takes the sum of a slot is the block that consumes it."""
        adds = self.follower.adds
        if self._call is None or not adds:
            return
        tags = map(self.follower.tags.get, tensors_in([*args, *kwargs.values()]))
        if taken := {key for tag in tags if isinstance(tag, Summed) for key in tag.keys}:
            for at, add in enumerate(adds):
                if (add.group, add.index) in taken and not add.up_block:
                    adds[at] = replace(add, up_block=path)

    def unet_returned(self, output: Any) -> None:
        """The UNet's forward ended: with a result, or with the exception now in flight."""
        if (call := self._call) is not None:
            refused = _first_line(sys.exception()) if output is None else ""
            adds, others = tuple(self.follower.adds), tuple(sorted(self.follower.misunderstood.items()))
            self.traces.append(Trace(call.geometry, call.emitted, call.arrived, adds, others, refused))
        self._call, self.follower.inside = None, False

    def _was_emitted(self, number: int, index: int, tensor: Tensor, group: Group) -> None:
        maker = self.follower.makers.get(tensor, "")
        self._emitted.append(Residual(number, index, tuple(tensor.shape), dtype_name(tensor), maker, group))
        self.follower.tags[tensor] = Emitted(frozenset({(number, index)}))

    def _arrival(self, group: Group, index: int, tensor: Tensor) -> Arrival:
        tag = self.follower.tags.get(tensor)
        sources, via = (tuple(sorted(tag.sources)), tag.via) if isinstance(tag, Emitted) else ((), ())
        return Arrival(index, tuple(tensor.shape), dtype_name(tensor), sources, via, group)


@contextmanager
def record(unet: nn.Module, controlnets: Sequence[nn.Module] = (), adapters: Sequence[nn.Module] = ()) -> Iterator[Recorder]:
    """Watch these modules for as long as the context lasts; every hook is gone when it ends, however it ends.

    Each call of `unet` inside it appends a Trace to `recorder.traces`.
    """
    recorder = Recorder(unet)
    with ExitStack() as hooks:
        for number, controlnet in enumerate(controlnets):
            _watch_emitter(controlnet, partial(recorder.controlnet_returned, number), recorder, hooks)
        for number, adapter in enumerate(adapters, start=len(controlnets)):
            _watch_emitter(adapter, partial(recorder.adapter_returned, number), recorder, hooks)
        _watch_unet(recorder, unet, hooks)
        hooks.enter_context(recorder.follower)
        yield recorder


def _watch_emitter(emitter: nn.Module, returned: Callable[[Any], None], recorder: Recorder, hooks: ExitStack) -> None:
    for path, module in emitter.named_modules():
        if path:
            hooks.callback(module.register_forward_hook(_maker_hook(recorder, path)).remove)
    hooks.callback(emitter.register_forward_hook(lambda module, args, output: returned(output)).remove)


def _watch_unet(recorder: Recorder, unet: nn.Module, hooks: ExitStack) -> None:
    called = unet.register_forward_pre_hook(lambda module, args, kwargs: recorder.unet_called(args, kwargs), with_kwargs=True)
    returned = unet.register_forward_hook(lambda module, args, output: recorder.unet_returned(output), always_call=True)
    hooks.callback(called.remove)
    hooks.callback(returned.remove)
    for path, module in unet.named_modules():
        if path:
            hooks.callback(module.register_forward_hook(_maker_hook(recorder, path)).remove)
            hooks.callback(module.register_forward_pre_hook(_taker_hook(recorder, path), with_kwargs=True).remove)


def _maker_hook(recorder: Recorder, path: str) -> Callable[..., None]:
    return lambda module, args, output: recorder.remember_maker(path, output)


def _taker_hook(recorder: Recorder, path: str) -> Callable[..., None]:
    return lambda module, args, kwargs: recorder.module_called(path, args, kwargs)


_ARGUMENTS = (
    ("sample", 0),
    ("encoder_hidden_states", 2),
    ("down_block_additional_residuals", 8),
    ("mid_block_additional_residual", 9),
    ("down_intrablock_additional_residuals", 10),
)
"""Name and position of the arguments of UNet2DConditionModel.forward that are read."""


def _argument(name: str, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs[name] if name in kwargs else args[position] if len(args) > position else None


def _downs_and_mid(output: Any) -> tuple[Any, Any]:
    """What a ControlNet returned, as diffusers' output class, its dict, or a pair."""
    values = tuple(output.values()) if isinstance(output, Mapping) else output
    return (values[0], values[1]) if isinstance(values, (tuple, list)) and len(values) >= 2 else ((), None)


def _residuals(downs: Any, mid: Any) -> list[tuple[int, Tensor]]:
    """Index and tensor of each residual; a number, which diffusers adds too, has no shape to observe."""
    every = [*enumerate(downs if isinstance(downs, (list, tuple)) else ()), (MID, mid)]
    return [(index, tensor) for index, tensor in every if isinstance(tensor, Tensor)]


def _only_tensor(output: Any) -> Tensor | None:
    """The tensor of an output that holds one and no more, as a block's does not."""
    if isinstance(output, Tensor):
        return output
    values = tuple(output.values()) if isinstance(output, Mapping) else output
    return values[0] if isinstance(values, tuple) and len(values) == 1 and isinstance(values[0], Tensor) else None


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}".splitlines()[0] if error else "no result"
