"""A table somebody claims a UNet needs: what is known of each residual, before it is compared with one UNet at one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import Shape
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.explain.residual_table import ResidualShapes, ResidualTable, Size

MID = -1


def name_slots(numbers: Sequence[int], *, has_mid: bool) -> str:
    """Return `slots 2, 5 and mid`."""
    downs = [f"slot{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"] if numbers else []
    return " and ".join([*downs, *["mid"] * has_mid])


@dataclass(frozen=True, slots=True)
class Entry:
    """One residual as it is claimed; None for what is not said."""

    channels: int
    size: Size | None = None
    batch: int | None = None
    shape: Shape | None = None
    """The whole shape, if it has not four axes."""

    def shape_at(self, table: ResidualTable, index: int) -> Shape:
        """Return its shape at the table's geometry, with what is not said taken from that slot; mid is at -1."""
        if self.shape is not None:
            return self.shape
        right = table.mid if index == MID or index >= len(table.downs) else table.downs[index]
        return (self.batch or table.geometry.batch, self.channels, *(self.size or right[2:]))


@dataclass(frozen=True, slots=True)
class Claim:
    """Residuals by number in order, `mid` at -1 and last."""

    entries: Mapping[int, Entry]
    named: bool
    """True if each has its slot's name, so that one that is left out moves no other."""
    tells_mid: bool
    """True if the mid residual stands apart; else the last of a list may be it."""
    origin: str
    notes: tuple[str, ...] = ()
    """How it was read, if it could have been read otherwise."""

    @property
    def downs(self) -> Mapping[int, Entry]:
        return {index: entry for index, entry in self.entries.items() if index != MID}

    @property
    def gaps(self) -> tuple[int, ...]:
        """Numbers left out before the last, of residuals with names; -1 for mid."""
        if not self.named or not self.downs:
            return ()
        return tuple(index for index in (*range(max(self.downs)), MID) if index not in self.entries)

    def from_zero(self, downs: int) -> Claim:
        """Return it with the numbers of the slots, if its names count from one to `downs`; else itself."""
        if not self.named or downs < 1 or list(self.downs) != list(range(1, downs + 1)):
            return self
        moved = {index if index == MID else index - 1: entry for index, entry in self.entries.items()}
        note = f"the names count from one: number 1 is taken for slot 0, number {downs} for slot {downs - 1}"
        return replace(self, entries=moved, notes=(*self.notes, note))

    def tables(self, table: ResidualTable) -> Iterator[ResidualShapes]:
        """Yield everything that it can mean, the likelier first."""
        downs = tuple(entry.shape_at(table, index) for index, entry in self.downs.items())
        if self.tells_mid:
            yield ResidualShapes(downs, self.entries[MID].shape_at(table, MID) if MID in self.entries else None)
            return
        whole = ResidualShapes(downs, None)
        with_mid = ResidualShapes(downs, table.mid)  # a list of down residuals alone says nothing of mid
        split = ResidualShapes(downs[:-1], self.downs[max(self.downs)].shape_at(table, MID)) if downs else whole
        yield from (split, with_mid, whole) if len(downs) > len(table.downs) else (with_mid, split, whole)

    def named_shapes(self, table: ResidualTable) -> dict[str, Shape]:
        """Return slot name → shape, as they are claimed."""
        return {
            SHAPECHECK.mid if index == MID else SHAPECHECK.down(index): entry.shape_at(table, index)
            for index, entry in self.entries.items()
        }

    def completed(self, table: ResidualTable) -> ResidualShapes:
        """Return it with the right shape in every gap."""
        right = {index: shape for index, shape in enumerate(table.downs) if index in self.gaps}
        shapes = {MID: table.mid} | right | {index: entry.shape_at(table, index) for index, entry in self.entries.items()}
        return ResidualShapes(tuple(shapes[index] for index in sorted(shapes) if index != MID), shapes[MID])

    def sizes(self) -> tuple[Size, ...]:
        """Return every height and width that is said."""
        sizes = (entry.shape[-2:] if entry.shape else entry.size for entry in self.entries.values())
        return tuple(dict.fromkeys((size[0], size[1]) for size in sizes if size))

    @property
    def batch(self) -> int | None:
        """The batch that most entries say."""
        batches = [entry.batch for entry in self.entries.values() if entry.batch]
        return max(set(batches), key=batches.count) if batches else None
