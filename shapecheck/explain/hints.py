"""Widths, sizes and batches that a text or a table names: faults are tried with these beside the UNet's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shapecheck.contract import Shape
from shapecheck.explain.residual_table import ResidualShapes, Size

_LARGEST = 2**20
"""Of any axis of a tensor that anybody has."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What residuals were said to have. A side that is not known is None."""

    widths: tuple[int, ...] = ()
    """Channels."""
    sizes: tuple[tuple[int | None, int | None], ...] = ()
    """Height and width in cells."""
    batches: tuple[int, ...] = ()

    @classmethod
    def of_shapes(cls, shapes: Iterable[Shape]) -> Hints:
        """Those of residuals whose whole shape is known."""
        whole = [shape for shape in dict.fromkeys(shapes) if len(shape) == 4 and all(0 < size <= _LARGEST for size in shape)]
        return cls(
            tuple(dict.fromkeys(shape[1] for shape in whole)),
            tuple(dict.fromkeys((shape[2], shape[3]) for shape in whole)),
            tuple(dict.fromkeys(shape[0] for shape in whole)),
        )

    @classmethod
    def of_axis(cls, axis: int, size: int) -> Hints:
        """Of one axis of a residual of four."""
        if not 0 < size <= _LARGEST:
            return cls()
        return [cls(batches=(size,)), cls(widths=(size,)), cls(sizes=((size, None),)), cls(sizes=((None, size),))][axis]

    @classmethod
    def of_given(cls, given: ResidualShapes) -> Hints:
        """Those of a whole table."""
        return cls.of_shapes((*given.downs, given.mid or ()))


def complete_size(rows: int | None, columns: int | None, own: Size, latent: Size) -> Iterator[Size]:
    """Yield sizes of which a side may be unknown: that side is then in the proportions of `latent`, or `own`'s."""
    if rows is not None and columns is not None:
        yield rows, columns
    elif rows is not None:
        yield rows, max(1, round(rows * latent[1] / latent[0]))
        yield rows, own[1]
    elif columns is not None:
        yield max(1, round(columns * latent[0] / latent[1])), columns
        yield own[0], columns
