"""Watching a run: what the ControlNets emit, what reaches the UNet, and every add that consumes it.

Module hooks see what goes in and out of modules. The adds are written inside a forward, between modules, so a dispatch
mode watches the operations themselves and follows each residual to the add that takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from shapecheck.contract import Geometry
from shapecheck.contract.geometry import USUAL_TOKENS
from shapecheck.observe.residual_tracer import Arrived, Emitted, ResidualTracer, Summed, find_tensors, name_dtype
from shapecheck.observe.trace import Arrival, Group, Residual, Trace

_ARGUMENTS = {
    "sample": 0,
    "encoder_hidden_states": 2,
    "down_block_additional_residuals": 8,
    "mid_block_additional_residual": 9,
    "down_intrablock_additional_residuals": 10,
}
"""Name and position of the arguments of UNet2DConditionModel.forward that are read."""


class Recorder:
    """Collects a Trace for every call of the UNet made while it is active."""

    def __init__(self, unet: nn.Module) -> None:
        self.traces: list[Trace] = []
        self.follower = ResidualTracer({id(module): path for path, module in unet.named_modules()})
        self._emitted: list[Residual] = []
        self._call: Trace | None = None

    def take_emitted(self) -> tuple[Residual, ...]:
        """Return what ControlNets and adapters emitted since the last UNet call, and forget it."""
        emitted, self._emitted = tuple(self._emitted), []
        return emitted

    def remember_maker(self, path: str, output: Any) -> None:
        """Note which module made a tensor: the outermost that returns it first, or alone, and not again beside it.

        A down block returns its last tensor among its skips too, and made none of them. What else a forward returns, as
        forks return caches, is no skip.
        """
        values = tuple(output.values()) if isinstance(output, Mapping) else output
        first, *others = values if isinstance(values, tuple) and values else (values,)
        if isinstance(first, Tensor) and not any(other is first for other in find_tensors(others)):
            self.follower.makers[first] = path

    def controlnet_returned(self, number: int, output: Any) -> None:
        """Note the residuals of ControlNet `number`, from diffusers' output class, its dict, or a pair."""
        values = tuple(output.values()) if isinstance(output, Mapping) else output
        if isinstance(values, (tuple, list)) and len(values) >= 2:
            self._add_emitted(number, "control", _number_residuals(*values[:2]))

    def adapter_returned(self, number: int, output: Any) -> None:
        """Note the features of T2I-Adapter `number`, counted after the ControlNets."""
        self._add_emitted(number, "feature", _number_residuals(output))

    def unet_called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        sample, text, downs, mid, features = (
            kwargs.get(name, args[position] if position < len(args) else None) for name, position in _ARGUMENTS.items()
        )
        tokens = text.shape[1] if isinstance(text, Tensor) and text.dim() == 3 else USUAL_TOKENS
        residuals: list[tuple[Group, int, Tensor]] = [("control", *pair) for pair in _number_residuals(downs, mid)]
        residuals += [("feature", *pair) for pair in _number_residuals(features)]
        arrivals = []
        for group, index, tensor in residuals:
            tag = self.follower.tags.get(tensor)
            sources, via = (tuple(sorted(tag.sources)), tag.via) if isinstance(tag, Emitted) else ((), ())
            arrivals.append(Arrival(index, tuple(tensor.shape), name_dtype(tensor), sources, via, group))
        # Tagged only now, for one tensor may be given for several slots.
        for _, _, tensor in residuals:
            keys = tuple((group, index) for group, index, other in residuals if other is tensor)
            self.follower.tags[tensor] = Arrived(keys)
        geometry = Geometry(sample.shape[0], sample.shape[-2], sample.shape[-1], tokens)
        self._call = Trace(geometry, self.take_emitted(), tuple(arrivals))
        self.follower.enter()

    def module_called(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note which block consumes a slot: the first module that takes its sum."""
        adds = self.follower.adds
        if self._call is None or not adds:
            return
        tags = map(self.follower.tags.get, find_tensors([*args, *kwargs.values()]))
        if taken := {key for tag in tags if isinstance(tag, Summed) for key in tag.keys}:
            for position, add in enumerate(adds):
                if (add.group, add.index) in taken and not add.up_block:
                    adds[position] = replace(add, up_block=path)

    def unet_returned(self, output: Any) -> None:
        """End a call of the UNet: with a result, or with the exception now in flight."""
        if self._call is not None:
            error, refused = sys.exception(), ""
            if output is None:
                refused = f"{type(error).__name__}: {str(error).strip()[:300]}".splitlines()[0] if error else "no result"
            adds, misunderstood = tuple(self.follower.adds), tuple(sorted(self.follower.misunderstood.items()))
            self.traces.append(replace(self._call, adds=adds, misunderstood=misunderstood, refused=refused))
        self._call, self.follower.inside = None, False

    def _add_emitted(self, number: int, group: Group, residuals: Sequence[tuple[int, Tensor]]) -> None:
        for index, tensor in residuals:
            maker = self.follower.makers.get(tensor, "")
            self._emitted.append(Residual(number, index, tuple(tensor.shape), name_dtype(tensor), maker, group))
            self.follower.tags[tensor] = Emitted(frozenset({(number, index)}))


@contextmanager
def record(unet: nn.Module, controlnets: Sequence[nn.Module] = (), adapters: Sequence[nn.Module] = ()) -> Iterator[Recorder]:
    """Watch these modules for as long as the context lasts; every hook is gone when it ends, however it ends.

    Each call of `unet` inside it appends a Trace to `recorder.traces`.
    """
    recorder = Recorder(unet)
    emitters = [(controlnet, recorder.controlnet_returned) for controlnet in controlnets]
    emitters += [(adapter, recorder.adapter_returned) for adapter in adapters]
    with ExitStack() as hooks:
        for model in (*controlnets, *adapters, unet):  # of a module that they share the UNet's path is the one that counts
            for path, module in model.named_modules():
                if path:
                    maker = lambda _, args, output, path=path: recorder.remember_maker(path, output)  # noqa: E731
                    hooks.callback(module.register_forward_hook(maker).remove)
                if path and model is unet:
                    taker = lambda _, args, kwargs, path=path: recorder.module_called(path, args, kwargs)  # noqa: E731
                    hooks.callback(module.register_forward_pre_hook(taker, with_kwargs=True).remove)
        for number, (emitter, note) in enumerate(emitters):
            hook = lambda _, args, output, number=number, note=note: note(number, output)  # noqa: E731
            hooks.callback(emitter.register_forward_hook(hook).remove)
        called = unet.register_forward_pre_hook(lambda _, args, kwargs: recorder.unet_called(args, kwargs), with_kwargs=True)
        hooks.callback(called.remove)
        returned = unet.register_forward_hook(lambda _, args, output: recorder.unet_returned(output), always_call=True)
        hooks.callback(returned.remove)
        hooks.enter_context(recorder.follower)
        yield recorder


def _number_residuals(downs: Any, mid: Any = None) -> list[tuple[int, Tensor]]:
    """Return index and tensor of each residual; a number, which diffusers adds too, has no shape to observe."""
    every = [*enumerate(downs if isinstance(downs, (list, tuple)) else ()), (-1, mid)]
    return [(index, tensor) for index, tensor in every if isinstance(tensor, Tensor)]
