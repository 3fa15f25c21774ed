"""One residual wrong in itself: of another width, size or batch, or with other axes."""

from __future__ import annotations

from collections.abc import Iterator

from shapecheck.contract import Shape, show
from shapecheck.explain.fault import Fault, FaultKind
from shapecheck.explain.hints import Hints, complete_size
from shapecheck.explain.residual_table import ResidualTable

_CHANNELS = "give each residual the channels of its own slot"


_SIZE = "give each residual the size of its own slot"


_BATCH = "give every residual the batch of the latents"


_AXES = "give (batch, channels, height, width)"


def list_single(table: ResidualTable, hints: Hints) -> Iterator[Fault]:
    """Yield every single fault of this sort; widths, sizes and batches are those of the UNet and of the hints."""
    for index, (slot, right) in enumerate(zip(table.contract.slots, table.flat, strict=True)):
        residual = table.name_residual(index)
        for kind, told, change, shape in _list_wrong_shapes(table, hints, right, slot.stride):
            yield Fault(kind, f"{residual} has {told}", change, table.replace_shape(index, shape), (slot.name,))


def _list_wrong_shapes(
    table: ResidualTable, hints: Hints, right: Shape, stride: int
) -> Iterator[tuple[FaultKind, str, str, Shape]]:
    batch, channels, *size = right
    for width in dict.fromkeys((*(level.channels for level in table.levels), *hints.widths)):
        if width != channels:
            yield "width", f"{width} channels, not {channels}", _CHANNELS, (batch, width, *size)

    sizes = {level.size: f"stride {level.stride}" for level in table.levels}
    for rows, columns in hints.sizes:
        for other in complete_size(rows, columns, (size[0], size[1]), table.latent):
            sizes.setdefault(other, f"{show(other)} cells")
    for other, words in sizes.items():
        if other != tuple(size):
            yield "stride", f"{words}, not stride {stride}", _SIZE, (batch, channels, *other)

    for count in dict.fromkeys((1, *hints.batches)):
        if count != batch:
            silent = ": PyTorch adds it to every image" if count == 1 else ""
            yield "batch", f"batch {count}, not {batch}{silent}", _BATCH, (count, *right[1:])
    yield "rank", "no batch axis: PyTorch adds it to every image in silence", _AXES, right[1:]
    yield "rank", "an axis too many", _AXES, (1, *right)
