"""Where an exception came from: the calls of modules that it passed through, as the frames of its traceback hold them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from torch import nn

from shapecheck.runtime.unet_call import inner


class Traced(NamedTuple):
    """One call that an exception passed through."""

    error: BaseException
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inside: str
    """Path of the first module within it that the exception came from; empty where it was raised in its own forward."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it was explicitly raised from, each once."""
    met: dict[int, BaseException] = {}
    each: BaseException | None = error
    while each is not None and id(each) not in met:
        met[id(each)] = each
        yield each
        each = each.__cause__


def calls(error: BaseException, wanted: Callable[[nn.Module], bool]) -> list[Traced]:
    """The calls of wanted modules that this exception passed through, outermost first. What raised it from is not looked at."""
    frames = list(_of_modules(error))
    found = []
    for at, (function, module, values) in enumerate(frames):
        if function == "_call_impl" and wanted(module):
            inside = _first_inside(module, [each for _, each, _ in frames[at:]])
            found.append(Traced(error, module, values.get("args", ()), values.get("kwargs", {}), inside))
    return found


def raised_in(error: BaseException, file: str) -> nn.Module | None:
    """The module whose own forward raised this, where that stands in a file whose name begins so."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            last = module, PurePath(frame.f_code.co_filename).name
    return last[0] if last and last[1].startswith(file) else None


def _of_modules(error: BaseException) -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
    """The frames in which a module is `self`: the function, the module, the local variables."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        if isinstance(module := values.get("self"), nn.Module):
            yield frame.f_code.co_name, module, values


def _first_inside(module: nn.Module, after: list[nn.Module]) -> str:
    names = {id(each): name for name, each in inner(module).named_modules() if name}
    return next((names[id(each)] for each in after if id(each) in names), "")
