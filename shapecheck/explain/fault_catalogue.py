"""Every fault that has a name, at one geometry, among them those of one residual: its width, size, batch or axes are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from shapecheck.contract import Shape, show
from shapecheck.explain.hints import Hints, complete_size
from shapecheck.explain.reordered import list_reordered
from shapecheck.explain.residual_table import Fault, FaultKind, ResidualShapes, ResidualTable
from shapecheck.explain.wrong_tables import list_wrong_tables


def list_faults(table: ResidualTable, hints: Hints = Hints()) -> list[tuple[Fault, ...]]:  # noqa: B008  # it is frozen
    """Return all faults, grouped by the table they lead to: no shape can tell those of one group apart."""
    order = get_args(FaultKind)
    faults = (*list_wrong_tables(table, hints), *list_reordered(table), *_list_single(table, hints))
    groups: dict[ResidualShapes, list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: order.index(fault.kind)):
        if fault.given != table.right:
            groups.setdefault(fault.given, []).append(fault)
    return [tuple(group) for group in groups.values()]


def _list_single(table: ResidualTable, hints: Hints) -> Iterator[Fault]:
    for index, (slot, right) in enumerate(zip(table.contract.slots, table.flat, strict=True)):
        for kind, flaw, change, shape in _list_wrong_shapes(table, hints, right, slot.stride):
            message = f"{table.name_residual(index)} has {flaw}"
            yield Fault(kind, message, change, table.replace_shape(index, shape), (slot.name,))


def _list_wrong_shapes(
    table: ResidualTable, hints: Hints, right: Shape, stride: int
) -> Iterator[tuple[FaultKind, str, str, Shape]]:
    batch, channels, *size = right
    change = "give each residual the channels of its own slot"
    for width in dict.fromkeys((*(level.channels for level in table.levels), *hints.widths)):
        if width != channels:
            yield "width", f"{width} channels, not {channels}", change, (batch, width, *size)

    sizes = {level.size: f"stride {level.stride}" for level in table.levels}
    for rows, columns in hints.sizes:
        for other in complete_size(rows, columns, (size[0], size[1]), table.latent):
            sizes.setdefault(other, f"{show(other)} cells")
    change = "give each residual the size of its own slot"
    for other, words in sizes.items():
        if other != tuple(size):
            yield "stride", f"{words}, not stride {stride}", change, (batch, channels, *other)

    change = "give every residual the batch of the latents"
    for count in dict.fromkeys((1, *hints.batches)):
        if count != batch:
            silent = ": PyTorch adds it to every image" if count == 1 else ""
            yield "batch", f"batch {count}, not {batch}{silent}", change, (count, *right[1:])
    change = "give (batch, channels, height, width)"
    yield "rank", "no batch axis: PyTorch adds it to every image in silence", change, right[1:]
    yield "rank", "an axis too many", change, (1, *right)
