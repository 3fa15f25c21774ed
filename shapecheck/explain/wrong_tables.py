"""Whole tables made by a wrong rule: channels per block, one size for all, another rounding, another model's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

from shapecheck import presets
from shapecheck.contract import Contract, Dim, Geometry, Shape, ShapecheckError
from shapecheck.explain.residual_table import Fault, FaultKind, Hints, ResidualShapes, ResidualTable, right_shapes

_TABLE = "take channels and size of each residual from the contract's table, one row a slot"
_AXES = "give (batch, channels, height, width)"
_REPEATS = (1, 2, 3, 4)
_Rule = tuple[FaultKind, str, str, Sequence[Shape]]
"""A rule that changes every residual: kind, what was done, what to do instead, and all shapes in slot order."""


def list_wrong_tables(table: ResidualTable, hints: Hints) -> Iterator[Fault]:
    """Yield the tables of every wrong rule that has a name; sizes and batches are those of the UNet and of the hints."""
    yield from _take_block_channels(table)
    yield from _count_layers(table)
    yield from _run_at_other_geometry(table, hints)

    families: dict[ResidualShapes, list[str]] = {}
    for names, contract in list_families():
        families.setdefault(emitted_shapes(contract, table.geometry), []).extend(names)
    for residuals, alike in families.items():
        message = f"this is the table of {', '.join(alike[:4])}{', …' * (len(alike) > 4)}"
        yield Fault("family", message, "take a ControlNet made for this UNet, or the UNet it was made for", residuals)

    message = "residuals have no batch axis: PyTorch adds them to every image in silence"
    yield Fault("rank", message, _AXES, ResidualShapes.split([shape[1:] for shape in table.flat]))
    yield Fault("rank", "residuals have an axis too many", _AXES, ResidualShapes.split([(1, *shape) for shape in table.flat]))
    message = "residuals are 1×1: PyTorch adds them to every cell in silence"
    change = "right for ControlNets with global_pool_conditions; else give residuals of full size"
    yield Fault("pooled", message, change, ResidualShapes.split([(*shape[:2], 1, 1) for shape in table.flat]))
    for rule in (_make_constant, _round_sizes, _reorder_axes, _change_channels, _scale_sizes):
        for kind, message, change, flat in rule(table):
            wrong = ResidualShapes.split(flat)
            yield Fault(kind, message, change, wrong)
            if wrong.mid != table.mid:
                yield Fault(kind, f"{message}, but mid is right", change, replace(wrong, mid=table.mid))


def _take_block_channels(table: ResidualTable) -> Iterator[Fault]:
    """Take block_out_channels for the slots: all levels; without the first; without the first, the last repeated to fill."""
    levels, batch = table.levels, table.geometry.batch
    starts = [(levels, "")]
    if len(levels) > 1:
        starts += [(levels[1:], " without its first level"), ((*levels[1:], levels[-1]), " a level too early")]
    for (start, skipped), times, at in product(starts, _REPEATS, (None, *levels)):
        chosen = [level for level in start for _ in range(times)]
        downs = tuple((batch, level.channels, *(at or level).size) for level in chosen)
        widths = ", ".join(str(level.channels) for level in start)
        repeated = "" if times == 1 else f", {times} times each"
        where = f"all at stride {at.stride}" if at else "each at the stride of its level"
        message = f"block_out_channels{skipped} ({widths}) taken for the slots{repeated}, {where}"
        yield Fault("blocks", message, _TABLE, ResidualShapes(downs, table.mid))
        if downs[-1] != table.mid:
            yield Fault("blocks", f"{message}, mid too", _TABLE, ResidualShapes(downs, downs[-1]))


def _count_layers(table: ResidualTable) -> Iterator[Fault]:
    """Take another number of layers a level, or forget the slots that are not layers."""
    batch, levels = table.geometry.batch, table.levels
    for layers, stem, between in product(_REPEATS, (True, False), (True, False)):
        shapes: list[Shape] = [(batch, levels[0].channels, *levels[0].size)] if stem else []
        for index, level in enumerate(levels):
            shapes += [(batch, level.channels, *level.size)] * layers
            if between and index < len(levels) - 1:
                shapes.append((batch, level.channels, *levels[index + 1].size))
        forgotten = [*([] if stem else ["conv_in"]), *([] if between else ["the downsamplers"])]
        without = f", and none for {' and '.join(forgotten)}" if forgotten else ""
        message = f"{layers} residual{'s' * (layers > 1)} a level for its layers{without}"
        yield Fault("layers", message, _TABLE, ResidualShapes(tuple(shapes), table.mid))


@cache
def list_families() -> tuple[tuple[tuple[str, ...], Contract], ...]:
    """Return one contract for each different list of slots among the presets, with the names of all that share it."""
    groups: dict[object, list[str]] = {}
    for name, contract in presets.contracts().items():
        groups.setdefault(tuple(slot.shape for slot in contract.slots), []).append(name)
    return tuple((tuple(sorted(names, key=len)), presets.contract(names[0])) for names in groups.values())


def emitted_shapes(contract: Contract, geometry: Geometry) -> ResidualShapes:
    """Return what a ControlNet made for that UNet emits, also at a size that the UNet itself refuses."""
    try:
        return right_shapes(contract, geometry)
    except ShapecheckError:  # nothing stops a ControlNet from emitting it
        return right_shapes(replace(contract, divisor=1), geometry)


def _run_at_other_geometry(table: ResidualTable, hints: Hints) -> Iterator[Fault]:
    """Take what the right ControlNet emits at latents of another size or batch."""
    divisor = table.contract.divisor
    change = "give the ControlNet an image of the size that is drawn"
    for rows, columns in hints.sizes:
        for height, width in table.complete_size(rows, columns, table.latent):
            if (height, width) != table.latent and not (height % divisor or width % divisor):
                message = f"the ControlNet ran at latents of {height}×{width}, the UNet at another size"
                ran_at = replace(table.geometry, height=height, width=width)
                yield Fault("size", message, change, right_shapes(table.contract, ran_at))
    change = "give both the same batch: with classifier-free guidance the latents are doubled for both"
    for batch in dict.fromkeys((1, *hints.batches)):
        if batch != table.geometry.batch:
            silent = ": PyTorch adds its residuals to every image" if batch == 1 else ""
            message = f"the ControlNet ran at batch {batch}, the UNet at another{silent}"
            yield Fault("batch", message, change, right_shapes(table.contract, replace(table.geometry, batch=batch)))


def _make_constant(table: ResidualTable) -> Iterator[_Rule]:
    """Give every residual one size, one width, or one shape."""
    for level in table.levels:
        stride, channels = f"stride {level.stride}", f"{level.channels} channels"
        at_size = [(*shape[:2], *level.size) for shape in table.flat]
        yield "constant", f"every residual has {stride}", _TABLE, at_size
        yield "constant", f"every residual has {channels}", _TABLE, [(b, level.channels, *size) for b, _, *size in table.flat]
        at_both = [(shape[0], level.channels, *level.size) for shape in table.flat]
        yield "constant", f"every residual has {channels} and {stride}", _TABLE, at_both


def _round_sizes(table: ResidualTable) -> Iterator[_Rule]:
    """Round halved sizes another way than the UNet."""
    for right_way, other in (("ceil", "floor"), ("floor", "ceil")):
        flat: list[Shape] = []
        for slot in table.contract.slots:
            axes = [Dim(dim.symbol, dim.scale, tuple(other for _ in dim.halvings)) for dim in slot.skip[2:]]  # type: ignore[misc]
            flat.append((table.geometry.batch, slot.channels, *(dim.at(table.geometry.sizes) for dim in axes)))
        down = other == "floor"
        rounding = "down, as in height // stride" if down else "up, as in (height + 1) // 2"
        change = f"halve step by step, rounding {'up' if down else 'down'} ({right_way}), as the UNet does"
        if all(min(shape) for shape in flat):
            yield "floor", f"sizes are halved rounding {rounding}", change, flat
    slots = zip(table.contract.slots, table.flat, strict=True)
    nearest = [(*shape[:2], *(max(1, round(side / slot.stride)) for side in table.latent)) for slot, shape in slots]
    change = "halve step by step, rounding as the UNet does, in place of dividing by the stride"
    yield "floor", "sizes are divided by the stride and rounded to the nearest", change, nearest


def _reorder_axes(table: ResidualTable) -> Iterator[_Rule]:
    height, width = table.latent
    if height != width:
        yield "transpose", "height and width are exchanged", _AXES, [(*shape[:2], *shape[:1:-1]) for shape in table.flat]
    last = [(shape[0], *shape[2:], shape[1]) for shape in table.flat]
    yield "transpose", "channels come last, as in images and in TensorFlow", _AXES, last


def _change_channels(table: ResidualTable) -> Iterator[_Rule]:
    """Make every residual twice as wide, or half."""
    flat, batch = table.flat, table.geometry.batch
    joined = "every residual has twice the channels: two were joined along the channels (dim=1), not along the batch (dim=0)"
    change = "join them along the batch: torch.cat([…], dim=0)"
    yield "channels", joined, change, [(batch, 2 * c, *size) for _, c, *size in flat]
    if batch % 2 == 0:
        half_batch = [(batch // 2, 2 * c, *size) for _, c, *size in flat]
        yield "channels", f"{joined}, which leaves half the batch", change, half_batch
    split = "every residual has half the channels: they were split along the channels (dim=1), not along the batch (dim=0)"
    thin = [(batch, max(1, c // 2), *size) for _, c, *size in flat]
    yield "channels", split, "split them along the batch: chunk(2, dim=0)", thin


def _scale_sizes(table: ResidualTable) -> Iterator[_Rule]:
    """Make the size of every residual wrong by the same factor, or by a cell."""
    change = "take the size of each residual from the contract's table, in latent cells"
    factor = table.contract.header.vae_factor
    scales: tuple[tuple[str, Callable[[int], int]], ...] = (
        (f"{factor} times the height and width: pixels were taken for latent cells", lambda side: factor * side),
        ("twice the height and width", lambda side: 2 * side),
        ("half the height and width", lambda side: max(1, side // 2)),
        ("half the height and width, rounded up", lambda side: -(-side // 2)),
    )
    for words, scale in scales:
        yield "size", f"every residual has {words}", change, [(*shape[:2], *map(scale, shape[2:])) for shape in table.flat]
    for rows, columns in ((0, 1), (1, 0), (1, 1)):
        lost = " and ".join([*["a row"] * rows, *["a column"] * columns])
        for by, much in ((-1, "less"), (1, "more")):
            moved = [(*shape[:2], max(1, shape[2] + by * rows), max(1, shape[3] + by * columns)) for shape in table.flat]
            yield "size", f"every residual has {lost} {much}", change, moved
