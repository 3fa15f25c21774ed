"""A table somebody claims a UNet takes: what is known of each residual, before it is held against one UNet at one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shapecheck.contract import Shape
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.faults.given import Given
from shapecheck.faults.table import Table

MID = -1


@dataclass(frozen=True, slots=True)
class Entry:
    """One residual as it is claimed; what is not said is None."""

    channels: int
    size: tuple[int, int] | None = None
    """Height and width in cells."""
    stride: int | None = None
    batch: int | None = None
    shape: Shape | None = None
    """The whole shape, where it has not four axes."""

    def at(self, table: Table, index: int) -> Shape:
        """Its shape at the table's geometry; what is not said is taken to be right for that slot, mid at -1."""
        if self.shape is not None:
            return self.shape
        return (self.batch or table.geometry.batch, self.channels, *(self.size or self._size(table, index)))

    def _size(self, table: Table, index: int) -> tuple[int, int]:
        if self.stride is not None:
            known = {level.stride: level.size for level in table.levels}
            height, width = table.latent
            return known.get(self.stride, (-(-height // self.stride), -(-width // self.stride)))
        flat = table.mid if index == MID or index >= len(table.downs) else table.downs[index]
        return flat[2], flat[3]


@dataclass(frozen=True, slots=True)
class Claim:
    """Residuals by number; `mid` at -1."""

    entries: tuple[tuple[int, Entry], ...]
    named: bool
    """Whether each is given under its slot's name, so that one that is left out moves no other."""
    tells_mid: bool
    """Whether the mid residual is told apart; else the last of a list may be it."""
    origin: str

    @property
    def downs(self) -> tuple[Entry, ...]:
        """In order, as a list would hold them."""
        return tuple(entry for index, entry in self.entries if index != MID)

    @property
    def gaps(self) -> tuple[int, ...]:
        """Numbers that are left out, of residuals given by name."""
        numbers = {index for index, _ in self.entries if index != MID}
        return tuple(index for index in range(max(numbers, default=-1)) if index not in numbers) if self.named else ()

    def tables(self, table: Table) -> Iterator[Given]:
        """What it can mean, the likelier first."""
        downs = self.downs
        mid = next((entry for index, entry in self.entries if index == MID), None)
        if self.tells_mid:
            yield _given(downs, mid, table)
            return
        whole = _given(downs, None, table)
        with_mid = Given(whole.downs, table.mid)  # a list of down residuals alone says nothing of mid
        split = _given(downs[:-1], downs[-1], table) if downs else whole
        yield from (split, with_mid, whole) if len(downs) > len(table.downs) else (with_mid, split, whole)

    def named_shapes(self, table: Table) -> dict[str, Shape]:
        """Slot name → shape, as they are claimed."""
        return {
            SHAPECHECK.mid if index == MID else SHAPECHECK.down(index): entry.at(table, index) for index, entry in self.entries
        }

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every height and width that is said."""
        told = (
            entry.size or (entry.shape[-2:] if entry.shape and len(entry.shape) >= 2 else None) for _, entry in self.entries
        )
        return tuple(dict.fromkeys((size[0], size[1]) for size in told if size))

    @property
    def batch(self) -> int | None:
        """The batch most entries say."""
        told = [entry.batch for _, entry in self.entries if entry.batch]
        return max(set(told), key=told.count) if told else None


def _given(downs: tuple[Entry, ...], mid: Entry | None, table: Table) -> Given:
    shapes = tuple(entry.at(table, index) for index, entry in enumerate(downs))
    return Given(shapes, None if mid is None else mid.at(table, MID))
