"""Widths, sizes and batches that a text or a table names: faults are tried with these beside the UNet's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shapecheck.contract import Shape
from shapecheck.explain.residual_table import Size

_LARGEST = 2**20
"""No axis of a real tensor is longer."""


@dataclass(frozen=True, slots=True)
class Hints:
    """Channels, heights and widths in cells (None for an unknown side), and batches that residuals are said to have."""

    widths: tuple[int, ...] = ()
    sizes: tuple[tuple[int | None, int | None], ...] = ()
    batches: tuple[int, ...] = ()

    @classmethod
    def of_shapes(cls, shapes: Iterable[Shape]) -> Hints:
        """Return the hints of residuals whose whole shape is known; other shapes give none."""
        whole = [shape for shape in dict.fromkeys(shapes) if len(shape) == 4 and all(0 < size <= _LARGEST for size in shape)]
        return cls(
            tuple(dict.fromkeys(shape[1] for shape in whole)),
            tuple(dict.fromkeys((shape[2], shape[3]) for shape in whole)),
            tuple(dict.fromkeys(shape[0] for shape in whole)),
        )

    @classmethod
    def of_axis(cls, axis: int, size: int) -> Hints:
        """Return the hint of one axis of (batch, channels, height, width)."""
        if not 0 < size <= _LARGEST:
            return cls()
        return [cls(batches=(size,)), cls(widths=(size,)), cls(sizes=((size, None),)), cls(sizes=((None, size),))][axis]


def complete_size(rows: int | None, columns: int | None, own: Size, latent: Size) -> Iterator[Size]:
    """Yield sizes for one of which a side may be unknown: that side is then in the proportions of `latent`, or `own`'s."""
    if rows is not None and columns is not None:
        yield rows, columns
    elif rows is not None:
        yield rows, max(1, round(rows * latent[1] / latent[0]))
        yield rows, own[1]
    elif columns is not None:
        yield max(1, round(columns * latent[0] / latent[1])), columns
        yield own[0], columns
