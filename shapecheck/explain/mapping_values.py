"""What a claimed table is made of: names that stand for a slot or a side, shapes with free axes, rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from shapecheck.contract import ShapecheckError
from shapecheck.contract.naming import SCHEMES
from shapecheck.explain.mapping import MID, Entry
from shapecheck.explain.matching import residual_index

_SIDE_WORD = re.compile("blocks?|res|residuals?|samples?|shapes?|slots?|outputs?|additional|controls?|controlnet|given")
"""What a name of one of the two sides has beside `down` or `mid`."""


_FREE = re.compile(r"\?|[A-Za-z_][A-Za-z0-9_]*")


_AXIS = r"(?:-1|\?|\d{1,9}|[A-WYZa-wyz_]{1,20})"


_WRITTEN = re.compile(rf"{_AXIS}(?:[xX×]{_AXIS}){{2,5}}")


_LARGEST = 2**20
"""Of any axis."""


_FEWEST_CHANNELS, _LARGEST_SIDE = 32, 256
"""Where plain numbers can be widths or one shape: channels are at least so many, sides in cells at most so many."""


def side(name: str) -> Literal["down", "mid"] | None:
    """The side of the table that a name stands for, in any case: down_shapes, DOWNS, mid_block_res_sample; None for others."""
    words = re.split(r"[_\-. ]", name.lower())
    rest = [word for word in words if not _SIDE_WORD.fullmatch(word)]
    if rest in (["down"], ["downs"]):
        return "down"
    return "mid" if rest in (["mid"], ["middle"]) else None


def slot_number(name: str, value: Any) -> int | None:
    """The number of the slot whose residual this value is by its name, -1 for mid; None where it is something else.

    A name of no known scheme, such as down_3, counts where the value can be a shape.
    """
    if sided := side(name):
        return MID if sided == "mid" else None
    index = residual_index(name) if residual_index(name) is not None else residual_index(name.lower())
    known = any(scheme.index(name.lower()) is not None for scheme in SCHEMES)
    return index if known or isinstance(value, (list, tuple, Mapping)) or written_axes(value) else None


def is_free(axis: Any) -> bool:
    """Whether this is how an axis is written whose size is left open: -1, None, ? or a name."""
    return axis is None or (type(axis) is int and axis == -1) or (isinstance(axis, str) and _FREE.fullmatch(axis) is not None)


def is_shape(value: Any) -> bool:
    """Whether this is (channels, height, width) or (batch, channels, height, width), or one with a few axes more.

    Any axis but the channels may be free.
    """
    if not isinstance(value, (list, tuple)) or not 3 <= len(value) <= 6:
        return False
    certain = {3: value[:1], 4: value[1:2]}.get(len(value), value)
    return all(type(axis) is int for axis in certain) and all(type(axis) is int or is_free(axis) for axis in value)


def written_axes(value: Any) -> list[int | str] | None:
    """The axes of text such as 2x320x64x96; None where it is something else."""
    if not isinstance(value, str) or _WRITTEN.fullmatch(value) is None:
        return None
    return [int(axis) if axis.lstrip("-").isdigit() else axis for axis in re.split("[xX×]", value)]


def is_residual(value: Any) -> bool:
    """Whether this can stand for a residual: channels, a shape, or a row that holds them."""
    row = isinstance(value, Mapping) and not {"shape", "opt", "channels"}.isdisjoint(value)
    return type(value) is int or is_shape(value) or written_axes(value) is not None or row


def is_list_of_shapes(value: Any) -> bool:
    """Whether this is a list of one shape or more, and nothing else."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_shape, value))


def is_pair(value: Any) -> bool:
    """Whether this is a list of shapes and one more: what a ControlNet returns."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and isinstance(value[0], (list, tuple))
        and all(map(is_shape, value[0]))
        and is_shape(value[1])
    )


def is_one_shape(value: Any) -> bool:
    """Whether a plain list is the shape of one residual, and not the widths of several."""
    if not is_shape(value) or len(value) > 4:
        return False
    first, *rest = value
    if is_free(first) or any(map(is_free, rest)) or first < _FEWEST_CHANNELS:
        return True
    return len(value) == 3 and max(rest) <= _LARGEST_SIDE and max(rest) < first


def entry_of(value: Any, where: str) -> Entry:
    """A number of channels, a shape, or a mapping with `shape`, with `opt`, or with `channels` and `stride`.

    Raises ShapecheckError, which begins with `where`, on anything else.
    """
    if isinstance(value, Mapping):
        shape, stride = value.get("shape", value.get("opt")), value.get("stride", value.get("scale"))
        if shape is None and type(value.get("channels")) is int:
            return checked(Entry(value["channels"], stride=stride if type(stride) is int else None), where, value)
        value = shape
    if type(value) is int:
        return checked(Entry(value), where, value)
    axes: Any = written_axes(value) or value
    if not is_shape(axes):
        raise ShapecheckError(
            f"{where}: expected (channels, height, width) or (batch, channels, height, width), got {str(value)[:60]!r}"
        )
    if len(axes) > 4:
        return checked(Entry(axes[0], shape=tuple(axes)), where, value)
    *batch, height, width = (None if is_free(axis) else axis for axis in (*axes[:-3], *axes[-2:]))
    return checked(Entry(axes[-3], (height, width), batch=batch[0] if batch else None), where, value)


def checked(entry: Entry, where: str, written: Any) -> Entry:
    """Itself. Raises ShapecheckError, which begins with `where` and shows what was written, where a size cannot be."""
    told = (entry.channels, *entry.size, entry.stride, entry.batch, *(entry.shape or ()))
    if not all(size is None or 0 < size <= _LARGEST for size in told):
        raise ShapecheckError(f"{where}: sizes go from 1 to {_LARGEST}, got {str(written)[:60]}")
    return entry
