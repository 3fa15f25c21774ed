"""A fault: one way in which residuals come to be wrong, and the table it leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shapecheck.explain.residual_table import ResidualShapes

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
    given: ResidualShapes
    slots: tuple[str, ...] = ()
    """The slots whose residuals were touched; empty if it is the whole table."""
