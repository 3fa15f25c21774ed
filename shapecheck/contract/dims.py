"""One axis of a tensor, as an expression over the sizes of a call: `320`, `h`, `ceil(h/4)`, `ceil(floor(h/2)/2)`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, cast

Rounding = Literal["ceil", "floor", "exact"]
"""The treatment of an odd size by one halving. `exact`: no odd size ever reached it, so its rounding is not known."""
Shape = tuple[int, ...]
_HALVED = re.compile(r"(?P<rounding>ceil|floor)\((?P<inner>.+)/(?P<divisor>\d+)\)|(?P<exact>.+)/(?P<exact_divisor>\d+)")
_PLAIN = re.compile(r"(?:(?P<scale>\d+)\*)?(?P<symbol>[a-z_]+)|(?P<constant>\d+)")


@dataclass(frozen=True, slots=True)
class Dim:
    """`scale * symbol`, halved once for each entry of `halvings`; the plain number `scale` if `symbol` is None."""

    symbol: str | None
    scale: int = 1
    halvings: tuple[Rounding, ...] = ()

    @property
    def stride(self) -> int:
        """Return the cells of the symbol's own grid along one cell of this axis."""
        return 1 << len(self.halvings)

    def at(self, sizes: Mapping[str, int]) -> int:
        """Return the size of this axis. Raises ValueError if a halving of unknown rounding would meet an odd size."""
        size = self.scale * (1 if self.symbol is None else sizes[self.symbol])
        for rounding in self.halvings:
            if rounding == "exact" and size % 2:
                raise ValueError(f"{self} is not known for {self.symbol}={sizes[self.symbol or '']}: {size} is odd")
            size = (size + 1) // 2 if rounding == "ceil" else size // 2
        return size

    def __str__(self) -> str:
        if self.symbol is None:
            return str(self.scale)
        text = self.symbol if self.scale == 1 else f"{self.scale}*{self.symbol}"
        for rounding, run in groupby(self.halvings):
            ratio = f"{text}/{2 ** len(tuple(run))}"
            text = ratio if rounding == "exact" else f"{rounding}({ratio})"
        return text

    to_value = __str__

    @classmethod
    def parse(cls, text: str) -> Dim:
        """Read `str`'s text. Raises ValueError naming the text that is not a dimension."""
        message = f"not a dimension: {text!r:.60} (expected forms: 320, h, 8*h, ceil(h/4), ceil(floor(h/2)/2))"
        if not isinstance(text, str) or len(text) > 200:
            raise ValueError(message)
        if plain := _PLAIN.fullmatch(text):
            if plain["constant"]:
                return cls(None, int(plain["constant"]))
            return cls(plain["symbol"], int(plain["scale"] or 1))
        halved = _HALVED.fullmatch(text)
        if halved is None:
            raise ValueError(message)
        inner = cls.parse(halved["inner"] or halved["exact"])
        divisor = int(halved["divisor"] or halved["exact_divisor"])
        steps = divisor.bit_length() - 1
        if inner.symbol is None or steps < 1 or divisor != 2**steps or steps > 16:
            raise ValueError(f"not a chain of halvings: {text!r}")
        rounding = cast(Rounding, halved["rounding"] or "exact")
        return cls(inner.symbol, inner.scale, inner.halvings + (rounding,) * steps)

    from_value = parse


BATCH = Dim("batch")
HEIGHT = Dim("h")
WIDTH = Dim("w")
TOKENS = Dim("tokens")


def constant(size: int) -> Dim:
    """Return an axis that is the same number in every call."""
    return Dim(None, size)


def show(shape: tuple[Dim, ...] | Shape) -> str:
    """Return a shape for a person to read: `2×320×64×64`."""
    return "×".join(map(str, shape)) if shape else "scalar"
