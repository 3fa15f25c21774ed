"""Watching a run: what the ControlNets emit, what reaches the UNet, and every add that consumes it.

Module hooks see what goes in and out of modules. The adds are written inside a forward, between modules, so a dispatch
mode watches the operations themselves and follows each residual to the add that takes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from shapecheck.contract import Add, AddSite, Arrival, Geometry, Residual, Trace
from shapecheck.observe.meta_kernels import META_KERNELS

MID = -1
"""Index of the mid residual."""

_aten = torch.ops.aten
_ADDS = frozenset({_aten.add.Tensor, _aten.add_.Tensor})
_SAME_VALUE = frozenset({
    _aten._to_copy.default, _aten.clone.default, _aten.detach.default, _aten.alias.default,
    _aten.mul.Tensor, _aten.mul.Scalar, _aten.mul_.Tensor, _aten.div.Tensor, _aten.mean.dim,
    _aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.slice.Tensor, _aten.split.Tensor,
})  # fmt: skip
_JOINS = frozenset({_aten.cat.default, _aten.stack.default})


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tag of a tensor made from these residuals, by these operations besides scaling and casting."""

    sources: frozenset[tuple[int, int]]
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    """Tag of a residual inside the UNet; several indices where one tensor was given for several slots."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Summed:
    """Tag of the sum of a skip and residual `index`."""

    index: int


Tag = Emitted | Arrived | Summed


@dataclass
class _Call:
    """One UNet call in progress."""

    geometry: Geometry
    emitted: tuple[Residual, ...]
    arrived: tuple[Arrival, ...]
    adds: list[Add]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Collects a Trace for every call of the UNet made while it is active."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.traces: list[Trace] = []
        self._paths = {id(module): path for path, module in unet.named_modules()}
        self._tags: Any = WeakIdKeyDictionary()
        self._makers: Any = WeakIdKeyDictionary()
        self._emitted: list[Residual] = []
        self._call: _Call | None = None

    def take_emitted(self) -> tuple[Residual, ...]:
        """What ControlNets emitted since the last UNet call."""
        emitted, self._emitted = tuple(self._emitted), []
        return emitted

    # what modules see

    def remember_maker(self, path: str, output: Any) -> None:
        """A module that returns one tensor made it, unless a module around it returns the same."""
        if (tensor := _only_tensor(output)) is not None:
            self._makers[tensor] = path

    def controlnet_returned(self, number: int, output: Any) -> None:
        """ControlNet `number` emitted its residuals."""
        for index, tensor in _residuals(output[0], output[1]):
            shape, dtype = tuple(tensor.shape), _dtype(tensor)
            self._emitted.append(Residual(number, index, shape, dtype, self._makers.get(tensor, "")))
            self._tags[tensor] = Emitted(frozenset({(number, index)}))

    def unet_called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The UNet received its arguments."""
        sample, text, downs, mid = (_argument(name, at, args, kwargs) for name, at in _ARGUMENTS)
        geometry = Geometry(sample.shape[0], sample.shape[-2], sample.shape[-1], text.shape[1] if _is_text(text) else 77)
        given = _residuals(downs, mid)
        arrived = tuple(self._arrival(index, tensor) for index, tensor in given)
        for _, tensor in given:
            self._tags[tensor] = Arrived(tuple(index for index, other in given if other is tensor))
        self._call = _Call(geometry, self.take_emitted(), arrived, [])

    def _arrival(self, index: int, tensor: Tensor) -> Arrival:
        tag = self._tags.get(tensor)
        sources, via = (tuple(sorted(tag.sources)), tag.via) if isinstance(tag, Emitted) else ((), ())
        return Arrival(index, tuple(tensor.shape), _dtype(tensor), sources, via)

    def module_called(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The first module that takes the sum of a slot is the block that consumes it."""
        if self._call is None or not self._call.adds:
            return
        taken = {tag.index for each in _tensors([*args, *kwargs.values()]) if isinstance(tag := self._tags.get(each), Summed)}
        for at, add in enumerate(self._call.adds):
            if add.index in taken and not add.up_block:
                self._call.adds[at] = replace(add, up_block=path)

    def unet_returned(self) -> None:
        """The UNet's forward ended, with a result or with the exception now in flight."""
        if (call := self._call) is not None:
            error = sys.exception()
            self.traces.append(Trace(call.geometry, call.emitted, call.arrived, tuple(call.adds), _first_line(error)))
            self._call = None

    # what operations see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kernel = META_KERNELS.get(func)
        if kernel is not None and args[0].is_meta:
            return kernel(*args, **(kwargs or {}))
        skip_maker = self._makers.get(args[0]) if func in _ADDS and isinstance(args[0], Tensor) else None
        result = func(*args, **(kwargs or {}))
        if func in _ADDS:
            self._saw_add(args, result, skip_maker)
        elif func in _SAME_VALUE:
            self._saw_same_value(args[0], result)
        elif func in _JOINS and self._call is None:
            self._saw_join(func, args[0], result)
        return result

    def _saw_add(self, args: tuple[Any, ...], result: Tensor, first_maker: str | None) -> None:
        left, right = args[0], args[1]
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return
        tags = self._tags.get(left), self._tags.get(right)
        if isinstance(tags[0], Emitted) and isinstance(tags[1], Emitted):
            self._tags[result] = Emitted(tags[0].sources | tags[1].sources, (*tags[0].via, *tags[1].via, "sum"))
        elif self._call is not None and (isinstance(tags[0], Arrived) or isinstance(tags[1], Arrived)):
            self._saw_slot(self._call, left, right, tags, result, first_maker)

    def _saw_slot(
        self,
        call: _Call,
        left: Tensor,
        right: Tensor,
        tags: tuple[Tag | None, Tag | None],
        result: Tensor,
        first_maker: str | None,
    ) -> None:
        if isinstance(tags[1], Arrived):
            skip, residual, tag, maker = left, right, tags[1], first_maker
        else:
            assert isinstance(tags[0], Arrived)
            skip, residual, tag, maker = right, left, tags[0], self._makers.get(right)
        added = {add.index for add in call.adds}
        index = next((index for index in tag.indices if index not in added), tag.indices[-1])
        site = _site(self._paths)
        dtypes = _dtype(skip), _dtype(residual)
        call.adds.append(Add(index, tuple(skip.shape), tuple(residual.shape), dtypes, maker or "", site))
        self._tags[result] = Summed(index)

    def _saw_same_value(self, source: Any, result: Any) -> None:
        if not isinstance(source, Tensor):
            return
        tag, maker = self._tags.get(source), self._makers.get(source)
        for each in result if isinstance(result, (list, tuple)) else (result,):
            if tag is not None:
                self._tags[each] = tag
            if maker is not None:
                self._makers[each] = maker

    def _saw_join(self, func: Any, parts: Sequence[Tensor], result: Tensor) -> None:
        tags = [tag for part in parts if isinstance(tag := self._tags.get(part), Emitted)]
        if tags:
            via = tuple(step for tag in tags for step in tag.via)
            self._tags[result] = Emitted(frozenset().union(*(tag.sources for tag in tags)), (*via, func._opname))


@contextmanager
def record(unet: nn.Module, controlnets: Sequence[nn.Module] = ()) -> Iterator[Recorder]:
    """Watch these modules for as long as the context lasts; every hook is gone when it ends, however it ends.

    Each call of `unet` inside it appends a Trace to `recorder.traces`.
    """
    recorder = Recorder(unet)
    with ExitStack() as hooks:
        for number, controlnet in enumerate(controlnets):
            _watch_controlnet(recorder, number, controlnet, hooks)
        _watch_unet(recorder, unet, hooks)
        hooks.enter_context(recorder)
        yield recorder


def _watch_controlnet(recorder: Recorder, number: int, controlnet: nn.Module, hooks: ExitStack) -> None:
    for path, module in controlnet.named_modules():
        if path:
            hooks.callback(module.register_forward_hook(_maker_hook(recorder, path)).remove)
    returned = controlnet.register_forward_hook(lambda module, args, output: recorder.controlnet_returned(number, output))
    hooks.callback(returned.remove)


def _watch_unet(recorder: Recorder, unet: nn.Module, hooks: ExitStack) -> None:
    called = unet.register_forward_pre_hook(lambda module, args, kwargs: recorder.unet_called(args, kwargs), with_kwargs=True)
    returned = unet.register_forward_hook(lambda module, args, output: recorder.unet_returned(), always_call=True)
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
)
"""Name and position of the arguments of UNet2DConditionModel.forward that are read."""


def _argument(name: str, position: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs[name] if name in kwargs else args[position] if len(args) > position else None


def _is_text(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3


def _residuals(downs: Sequence[Tensor] | None, mid: Tensor | None) -> list[tuple[int, Tensor]]:
    return [*enumerate(downs or ()), *([(MID, mid)] if mid is not None else [])]


def _only_tensor(output: Any) -> Tensor | None:
    """The tensor of an output that holds one and no more, as a block's does not."""
    if isinstance(output, Tensor):
        return output
    values = tuple(output.values()) if isinstance(output, Mapping) else output
    return values[0] if isinstance(values, tuple) and len(values) == 1 and isinstance(values[0], Tensor) else None


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _site(paths: Mapping[int, str]) -> AddSite:
    """The Python code that asked for the operation under way: the nearest caller outside PyTorch and this module."""
    frame = sys._getframe(1)
    while (name := frame.f_globals.get("__name__", "")).partition(".")[0] == "torch" or name == __name__:
        if frame.f_back is None:
            break
        frame = frame.f_back
    owner = paths.get(id(frame.f_locals.get("self")), "")
    return AddSite(owner, frame.f_code.co_qualname, name.replace(".", "/") + ".py", frame.f_lineno)


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}".splitlines()[0] if error else ""
