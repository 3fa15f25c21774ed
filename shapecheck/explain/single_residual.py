"""One residual wrong in itself: of another width, size or batch, or with other axes."""

from __future__ import annotations

from collections.abc import Iterator

from shapecheck.contract import Shape, show
from shapecheck.explain.fault import Fault
from shapecheck.explain.hints import Hints, completed
from shapecheck.explain.residual_table import Table


def singles(table: Table, hints: Hints) -> Iterator[Fault]:
    """Every single fault of this sort; widths, sizes and batches are those of the UNet and of the hints."""
    for at, (name, shape) in enumerate(zip(table.names, (*table.downs, table.mid), strict=True)):
        place = table.residual(at)
        for fault in (_width, _stride, _batch, _rank):
            yield from fault(table, hints, at, name, shape, place)


def _width(table: Table, hints: Hints, at: int, name: str, right: Shape, place: str) -> Iterator[Fault]:
    batch, channels, *size = right
    for width in dict.fromkeys((*(level.channels for level in table.levels), *hints.widths)):
        if width != channels:
            told = f"{place} has {width} channels, not {channels}"
            change = "give each residual the channels of its own slot"
            yield Fault("width", told, change, table.changed(at, (batch, width, *size)), (name,))


def _stride(table: Table, hints: Hints, at: int, name: str, right: Shape, place: str) -> Iterator[Fault]:
    """The size of another level, or any other."""
    own = right[-2], right[-1]
    sizes = {level.size: f"stride {level.stride}" for level in table.levels}
    for rows, columns in hints.sizes:
        for size in completed(rows, columns, own, table.latent):
            sizes.setdefault(size, f"{show(size)} cells")
    for size, called in sizes.items():
        if size != own:
            told = f"{place} has {called}, not stride {table.contract.slots[at].stride}"
            change = "give each residual the size of its own slot"
            yield Fault("stride", told, change, table.changed(at, (*right[:2], *size)), (name,))


def _batch(table: Table, hints: Hints, at: int, name: str, right: Shape, place: str) -> Iterator[Fault]:
    own = right[0]
    for batch in dict.fromkeys((1, *hints.batches)):
        if batch != own:
            silent = ": PyTorch adds it to every image" if batch == 1 else ""
            told = f"{place} has batch {batch}, not {own}{silent}"
            change = "give every residual the batch of the latents"
            yield Fault("batch", told, change, table.changed(at, (batch, *right[1:])), (name,))


def _rank(table: Table, hints: Hints, at: int, name: str, right: Shape, place: str) -> Iterator[Fault]:
    change = "give (batch, channels, height, width)"
    told = f"{place} has no batch axis: PyTorch adds it to every image in silence"
    yield Fault("rank", told, change, table.changed(at, right[1:]), (name,))
    yield Fault("rank", f"{place} has an axis too many", change, table.changed(at, (1, *right)), (name,))
