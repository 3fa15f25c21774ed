"""A table somebody claims a UNet takes: what is known of each residual, before it is held against one UNet at one size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shapecheck.contract import Shape
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.explain.residual_table import Given, Table

MID = -1


@dataclass(frozen=True, slots=True)
class Entry:
    """One residual as it is claimed; what is not said is None."""

    channels: int
    size: tuple[int | None, int | None] = (None, None)
    """Height and width in cells."""
    stride: int | None = None
    batch: int | None = None
    shape: Shape | None = None
    """The whole shape, where it has not four axes."""

    def at(self, table: Table, index: int) -> Shape:
        """Its shape at the table's geometry; what is not said is taken to be right for that slot, mid at -1."""
        if self.shape is not None:
            return self.shape
        sides = (own if told is None else told for told, own in zip(self.size, self._size(table, index), strict=True))
        return (self.batch or table.geometry.batch, self.channels, *sides)

    def _size(self, table: Table, index: int) -> tuple[int, int]:
        if self.stride is not None:
            known = {level.stride: level.size for level in table.levels}
            height, width = table.latent
            return known.get(self.stride, (-(-height // self.stride), -(-width // self.stride)))
        flat = table.mid if index == MID or index >= len(table.downs) else table.downs[index]
        return flat[2], flat[3]

    @property
    def told_size(self) -> tuple[int, int] | None:
        """Height and width in cells, where both are said."""
        height, width = self.shape[-2:] if self.shape else self.size
        return None if height is None or width is None else (height, width)


@dataclass(frozen=True, slots=True)
class Claim:
    """Residuals by number; `mid` at -1."""

    entries: tuple[tuple[int, Entry], ...]
    named: bool
    """Whether each is given under its slot's name, so that one that is left out moves no other."""
    tells_mid: bool
    """Whether the mid residual is told apart; else the last of a list may be it."""
    origin: str
    notes: tuple[str, ...] = ()
    """How it was read, where it could have been read otherwise."""

    @property
    def downs(self) -> tuple[tuple[int, Entry], ...]:
        """In order, as a list would hold them, each with its number."""
        return tuple((index, entry) for index, entry in self.entries if index != MID)

    @property
    def mid(self) -> Entry | None:
        """The mid residual, where it is told apart."""
        return next((entry for index, entry in self.entries if index == MID), None)

    @property
    def gaps(self) -> tuple[int, ...]:
        """Numbers that are left out before the last, of residuals given by name; -1 where mid is."""
        numbers = {index for index, _ in self.downs}
        if not self.named or not numbers:
            return ()
        return (*(index for index in range(max(numbers)) if index not in numbers), *((MID,) if self.mid is None else ()))

    def from_zero(self, downs: int) -> Claim:
        """Itself; where the names count one to `downs`, with the numbers of the slots."""
        numbers = [index for index, _ in self.downs]
        if not self.named or downs < 1 or numbers != list(range(1, downs + 1)):
            return self
        moved = tuple((index if index == MID else index - 1, entry) for index, entry in self.entries)
        note = f"the names count from one: number 1 is taken for slot 0, number {downs} for slot {downs - 1}"
        return replace(self, entries=moved, notes=(*self.notes, note))

    def tables(self, table: Table) -> Iterator[Given]:
        """What it can mean, the likelier first."""
        downs = self.downs
        if self.tells_mid:
            yield _given(downs, self.mid, table)
            return
        whole = _given(downs, None, table)
        with_mid = Given(whole.downs, table.mid)  # a list of down residuals alone says nothing of mid
        split = _given(downs[:-1], downs[-1][1], table) if downs else whole
        yield from (split, with_mid, whole) if len(downs) > len(table.downs) else (with_mid, split, whole)

    def named_shapes(self, table: Table) -> dict[str, Shape]:
        """Slot name → shape, as they are claimed."""
        return {
            SHAPECHECK.mid if index == MID else SHAPECHECK.down(index): entry.at(table, index) for index, entry in self.entries
        }

    def completed(self, table: Table) -> Given:
        """With what is right in every gap."""
        right = {index: shape for index, shape in enumerate(table.downs) if index in self.gaps}
        told = {index: entry.at(table, index) for index, entry in self.entries}
        downs = right | told
        return Given(tuple(downs[index] for index in sorted(downs) if index != MID), told.get(MID, table.mid))

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every height and width that is said."""
        return tuple(dict.fromkeys(size for _, entry in self.entries if (size := entry.told_size)))

    @property
    def batch(self) -> int | None:
        """The batch most entries say."""
        told = [entry.batch for _, entry in self.entries if entry.batch]
        return max(set(told), key=told.count) if told else None


def _given(downs: tuple[tuple[int, Entry], ...], mid: Entry | None, table: Table) -> Given:
    return Given(tuple(entry.at(table, index) for index, entry in downs), None if mid is None else mid.at(table, MID))
