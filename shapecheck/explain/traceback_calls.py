"""The origin of an exception: the calls of modules that it passed through, as the frames of its traceback hold them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from shapecheck.models.forward_call import unwrap_compiled


class FailedCall(NamedTuple):
    """A call that an exception passed through."""

    error: BaseException
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inside: str
    """Path of the first module within it that the exception came from; empty if its own forward raised."""


def follow_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was explicitly raised from, each once."""
    seen: dict[int, BaseException] = {}
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen[id(cause)] = cause
        yield cause
        cause = cause.__cause__


def find_calls(error: BaseException, matches: Callable[[nn.Module], bool]) -> list[FailedCall]:
    """Return the calls of matching modules that this exception passed through, outermost first; not those of its causes."""
    frames = _list_module_frames(error)
    calls = []
    for index, (code, module, values) in enumerate(frames):
        if code.co_name == "_call_impl" and matches(module):
            names = {id(child): name for name, child in unwrap_compiled(module).named_modules() if name}
            inside = next((names[id(later)] for _, later, _ in frames[index:] if id(later) in names), "")
            calls.append(FailedCall(error, module, values.get("args", ()), values.get("kwargs", {}), inside))
    return calls


def find_raising_module(error: BaseException, file: str) -> nn.Module | None:
    """Return the module whose own forward raised this, if that stands in a file whose name begins so."""
    frames = _list_module_frames(error)
    return frames[-1][1] if frames and PurePath(frames[-1][0].co_filename).name.startswith(file) else None


def _list_module_frames(error: BaseException) -> list[tuple[CodeType, nn.Module, Mapping[str, Any]]]:
    return [
        (frame.f_code, module, frame.f_locals)
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(module := frame.f_locals.get("self"), nn.Module)
    ]
