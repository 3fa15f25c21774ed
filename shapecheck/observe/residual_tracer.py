"""Following residuals through operations: from the ControlNet that emits them to the addition that takes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from shapecheck.contract import AddSite
from shapecheck.observe.meta_kernels import META_KERNELS
from shapecheck.observe.trace import Add, Group, name_slot

_SUMS = frozenset({"add", "sub", "rsub", "addcmul", "lerp", "_foreach_add"})
_CREATE = frozenset(
    {"zeros", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_empty"}
)
_KEEP_MAKER = frozenset({"_to_copy", "clone", "detach", "alias", "mul", "div", "mean", "view", "_unsafe_view", "expand"})


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tag of a tensor made from these residuals, by these operations besides scaling, casting and viewing."""

    sources: frozenset[tuple[int, int]]
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    """Tag of a residual inside the UNet, or of a feature: its group and index, or several if it is given for several slots."""

    keys: tuple[tuple[Group, int], ...]


@dataclass(frozen=True, slots=True)
class Summed:
    """Tag of the sum of a skip and these residuals or features."""

    keys: tuple[tuple[Group, int], ...]


_ZEROS = "zeros"
"""Tag of what guess mode puts in place of the unconditional half."""


class ResidualTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Watches every operation while it is active. Tags are weak: no tensor is kept alive.

    Outside a UNet's call whatever is computed from a residual is still that residual; inside it a residual stays one
    through views, casts and pointwise operations, until an addition to another tensor consumes it.
    `misunderstood` maps a slot to the operation that took its residual and is not an addition.
    """

    def __init__(self, paths: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self._paths = paths
        self.tags: Any = WeakIdKeyDictionary()
        self.makers: Any = WeakIdKeyDictionary()
        self.inside = False
        self.adds: list[Add] = []
        self.misunderstood: dict[str, str] = {}

    def enter(self) -> None:
        self.inside, self.adds, self.misunderstood = True, [], {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kernel = META_KERNELS.get(func)
        operation = func if kernel is None or not args[0].is_meta else kernel
        result = operation(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        keeps_maker = name in _KEEP_MAKER or (name == "add" and not isinstance(args[1], Tensor))
        if keeps_maker and args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            maker = self.makers.get(args[0])
            if maker is not None:
                self.makers[result] = maker
        if name in _CREATE:
            if "zeros" in name and isinstance(result, Tensor):
                self.tags[result] = _ZEROS
        elif len(self.tags.data):  # a dictionary's own length drops dead tensors first, and takes time at every operation
            for operands, output in _pair_operands(name, args, result):
                tags = [self.tags.get(operand) for operand in operands]
                if any(isinstance(tag, (Emitted, Arrived, Summed)) for tag in tags):
                    (self._trace_inside if self.inside else self._trace_outside)(name, func, operands, tags, output)
        return result

    def _trace_outside(self, name: str, func: Any, operands: list[Tensor], tags: list[Any], result: Any) -> None:
        emitted = [tag for tag in tags if isinstance(tag, Emitted)]
        if not emitted:
            return
        sources = frozenset[tuple[int, int]]().union(*(tag.sources for tag in emitted))
        via = [step for tag in emitted for step in tag.via]
        foreign = any(operand.dim() and not isinstance(tag, Emitted) for operand, tag in zip(operands, tags, strict=True))
        if name in _SUMS and (foreign or len(emitted) > 1):
            via.append("sum" if len(sources) > len(emitted[0].sources) else "addition of something else")
        elif name == "cat" and len(operands) == 2 and tags[0] is _ZEROS:
            via.append("zeros before it in the batch")
        elif name == "cat" and all(operand is operands[0] for operand in operands):
            via.append("repeated in the batch")
        elif not _is_transparent(name, func):
            via.append(name)
        self._tag(result, Emitted(sources, tuple(dict.fromkeys(via))))

    def _trace_inside(self, name: str, func: Any, operands: list[Tensor], tags: list[Any], result: Any) -> None:
        arrived = [(operand, tag) for operand, tag in zip(operands, tags, strict=True) if isinstance(tag, Arrived)]
        others = [value for value, tag in zip(operands, tags, strict=True) if value.dim() and not isinstance(tag, Arrived)]
        summed = next((tag for tag in tags if isinstance(tag, Summed)), None)
        if summed and (not arrived or name not in _SUMS):
            if _is_transparent(name, func):
                self._tag(result, summed)
        elif others and name in _SUMS:
            self._record_add(others[0], *arrived[0], result)
        elif not others or _is_transparent(name, func):
            self._tag(result, Arrived(tuple(dict.fromkeys(key for _, tag in arrived for key in tag.keys))))
        else:
            site = self._find_site()
            slots = (name_slot(index, group) for _, tag in arrived for group, index in tag.keys)
            self.misunderstood |= dict.fromkeys(slots, f"aten.{name} at {site.file}:{site.line}")

    def _record_add(self, skip: Tensor, residual: Tensor, tag: Arrived, result: Any) -> None:
        added = {(add.group, add.index) for add in self.adds}
        group, index = next((key for key in tag.keys if key not in added), tag.keys[-1])
        dtypes, maker = (name_dtype(skip), name_dtype(residual)), self.makers.get(skip) or ""
        shapes = tuple(skip.shape), tuple(residual.shape)
        before = self.tags.get(skip)
        self.adds.append(Add(index, *shapes, dtypes, maker, self._find_site(), group=group))
        self._tag(result, Summed(((group, index), *(before.keys if isinstance(before, Summed) else ()))))
        if group == "feature" and maker and isinstance(result, Tensor):
            self.makers[result] = maker  # a residual that is added to the same skip lands at the same module

    def _tag(self, result: Any, tag: Emitted | Arrived | Summed) -> None:
        for tensor in find_tensors([result]):
            self.tags[tensor] = tag

    def _find_site(self) -> AddSite:
        """Find the Python code that asked for the operation under way: the nearest caller outside PyTorch and this module."""
        frame = sys._getframe(1)
        while (name := frame.f_globals.get("__name__", "")).partition(".")[0] == "torch" or name == __name__:
            if frame.f_back is None:
                break
            frame = frame.f_back
        owner = self._paths.get(id(frame.f_locals.get("self")), "")
        return AddSite(owner, frame.f_code.co_qualname, name.replace(".", "/") + ".py", frame.f_lineno)


def find_tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among these values and in their lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from find_tensors(value)


def name_dtype(tensor: Tensor) -> str:
    """Return `float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def _pair_operands(name: str, args: tuple[Any, ...], result: Any) -> Iterator[tuple[list[Tensor], Any]]:
    """Yield operands and result of an operation, once for each element of the lists that a foreach operation takes."""
    if name == "_foreach_add" and isinstance(args[1], (list, tuple)):
        results = args[0] if result is None else result
        for left, right, output in zip(args[0], args[1], results, strict=True):
            yield [left, right], output
    else:
        yield list(find_tensors(args)), result


def _is_transparent(name: str, func: Any) -> bool:
    """Return whether a residual is still itself after an operation: one that is pointwise, a view or a cast."""
    if name in ("_to_copy", "_unsafe_view", "mean") or torch.Tag.pointwise in func.tags:
        return True
    return any(output.alias_info for output in func._schema.returns)
