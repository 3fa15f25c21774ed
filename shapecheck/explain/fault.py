"""A fault: one way in which residuals come to be wrong, and the table it leads to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from shapecheck.explain.residual_table import Given

FaultKind = Literal[
    "blocks", "layers", "family", "mid", "drop", "shift", "reverse", "constant", "floor", "transpose", "channels", "swap",
    "size", "batch", "rank", "pooled", "surplus", "stride", "width", "duplicate", "empty",
]  # fmt: skip
"""In the order they are told: a wrong rule before a table that was spoilt, and that before one wrong residual."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake, and the residuals that it leads to at one geometry."""

    kind: FaultKind
    told: str
    """What was done, in words."""
    change: str
    """What to do instead."""
    given: Given
    slots: tuple[str, ...] = ()
    """The slots whose residuals were touched; empty where it is the whole table."""


def alike(faults: Iterable[Fault]) -> list[tuple[Fault, ...]]:
    """Faults that lead to one and the same table together, since no shape can tell them apart, in the order they are told."""
    tables: dict[Given, list[Fault]] = {}
    order = get_args(FaultKind)
    for fault in sorted(faults, key=lambda each: order.index(each.kind)):
        tables.setdefault(fault.given, []).append(fault)
    return [tuple(each) for each in tables.values()]
