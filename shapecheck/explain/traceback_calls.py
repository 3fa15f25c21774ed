"""Where an exception came from: the calls of modules that it passed through, as the frames of its traceback hold them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from torch import nn

from shapecheck.models.forward_call import unwrap_compiled


class Traced(NamedTuple):
    """One call that an exception passed through."""

    error: BaseException
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inside: str
    """Path of the first module within it that the exception came from; empty where it was raised in its own forward."""


def follow_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was explicitly raised from, each once."""
    met: dict[int, BaseException] = {}
    cause: BaseException | None = error
    while cause is not None and id(cause) not in met:
        met[id(cause)] = cause
        yield cause
        cause = cause.__cause__


def find_calls(error: BaseException, is_wanted: Callable[[nn.Module], bool]) -> list[Traced]:
    """Return the calls of such modules that this exception passed through, outermost first; not of what raised it."""
    frames = [
        (frame.f_code.co_name, module, frame.f_locals)
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(module := frame.f_locals.get("self"), nn.Module)
    ]
    found = []
    for index, (function, module, values) in enumerate(frames):
        if function == "_call_impl" and is_wanted(module):
            names = {id(child): name for name, child in unwrap_compiled(module).named_modules() if name}
            inside = next((names[id(later)] for _, later, _ in frames[index:] if id(later) in names), "")
            found.append(Traced(error, module, values.get("args", ()), values.get("kwargs", {}), inside))
    return found


def find_raising_module(error: BaseException, file: str) -> nn.Module | None:
    """Return the module whose own forward raised this, if that stands in a file whose name begins so."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            last = module, PurePath(frame.f_code.co_filename).name
    return last[0] if last and last[1].startswith(file) else None
