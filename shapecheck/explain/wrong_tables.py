"""Families of UNets: presets whose slots are the same, and the residuals that a ControlNet of each emits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

from shapecheck import presets
from shapecheck.contract import Contract, Dim, Geometry, Shape, ShapecheckError, Slot
from shapecheck.explain.fault import Fault, FaultKind
from shapecheck.explain.hints import Hints, completed
from shapecheck.explain.residual_table import Given, Level, Size, Table, right


@cache
def families() -> tuple[tuple[tuple[str, ...], Contract], ...]:
    """Presets whose slots differ, each with the names of all that share them."""
    groups: dict[object, list[str]] = {}
    for name, contract in presets.contracts().items():
        groups.setdefault(tuple(slot.shape for slot in contract.slots), []).append(name)
    return tuple((tuple(sorted(names, key=len)), presets.contract(names[0])) for names in groups.values())


def emitted_at(contract: Contract, geometry: Geometry) -> Given:
    """What a ControlNet made for that UNet emits, also at a size that the UNet itself refuses."""
    try:
        return right(contract, geometry)
    except ShapecheckError:  # nothing stops a ControlNet from emitting it
        return right(replace(contract, divisor=1), geometry)


_TABLE = "take channels and size of each residual from the contract's table, one row a slot"


_JOIN = "join them along the batch: torch.cat([…], dim=0)"


_REPEATS = (1, 2, 3, 4)


def rules(table: Table, hints: Hints) -> Iterator[Fault]:
    """Every wrong rule there is a name for; sizes and batches are those of the UNet and of the hints."""
    yield from _blocks(table)
    yield from _layers(table)
    yield from _families(table)
    yield from _constant(table)
    yield from _rounded(table)
    yield from _turned(table)
    yield from _other_channels(table)
    yield from _other_sizes(table, hints)
    yield from _scaled(table)
    yield from _other_batches(table, hints)
    yield from _broadcast(table)


def _blocks(table: Table) -> Iterator[Fault]:
    """block_out_channels taken for the slots."""
    levels, batch = table.levels, table.geometry.batch
    sizes: list[tuple[int, Size | None]] = [(0, None), *((level.stride, level.size) for level in levels)]
    for start, times, (stride, size) in product(_starts(levels), _REPEATS, sizes):
        chosen = [level for level in start for _ in range(times)]
        downs = tuple((batch, level.channels, *(size or level.size)) for level in chosen)
        last = (batch, chosen[-1].channels, *downs[-1][2:])
        each = "" if times == 1 else f", {times} times each"
        where = f"all at stride {stride}" if size else "each at the stride of its level"
        told = f"block_out_channels{_skipped(start, levels)} taken for the slots{each}, {where}"
        yield Fault("blocks", told, _TABLE, Given(downs, table.mid))
        if last != table.mid:
            yield Fault("blocks", f"{told}, mid too", _TABLE, Given(downs, last))


def _skipped(start: tuple[Level, ...], levels: tuple[Level, ...]) -> str:
    widths = ", ".join(str(level.channels) for level in start)
    if start == levels:
        return f" ({widths})"
    return f" without its first level ({widths})" if len(start) < len(levels) else f" a level too early ({widths})"


def _starts(levels: tuple[Level, ...]) -> Iterator[tuple[Level, ...]]:
    """All levels; without the first; without the first, the last repeated to fill."""
    yield levels
    if len(levels) > 1:
        yield levels[1:]
        yield (*levels[1:], levels[-1])


def _layers(table: Table) -> Iterator[Fault]:
    """Another number of layers a level, or the slots that are not layers forgotten."""
    batch, levels = table.geometry.batch, table.levels
    for layers, stem, between in product(_REPEATS, (True, False), (True, False)):
        shapes: list[Shape] = [(batch, levels[0].channels, *levels[0].size)] if stem else []
        for at, level in enumerate(levels):
            shapes += [(batch, level.channels, *level.size)] * layers
            if between and at < len(levels) - 1:
                shapes.append((batch, level.channels, *levels[at + 1].size))
        given = Given(tuple(shapes), table.mid)
        if given == table.right:
            continue
        forgotten = [*([] if stem else ["conv_in"]), *([] if between else ["the downsamplers"])]
        without = f", and none for {' and '.join(forgotten)}" if forgotten else ""
        yield Fault("layers", f"{layers} residual{'s' * (layers > 1)} a level for its layers{without}", _TABLE, given)


def _families(table: Table) -> Iterator[Fault]:
    """The table of another model."""
    tables: dict[Given, list[str]] = {}
    for names, contract in families():
        tables.setdefault(emitted_at(contract, table.geometry), []).extend(names)
    for given, alike in tables.items():
        if given != table.right:
            told = f"this is the table of {', '.join(alike[:4])}{', …' * (len(alike) > 4)}"
            yield Fault("family", told, "take a ControlNet made for this UNet, or the UNet it was made for", given)


def _constant(table: Table) -> Iterator[Fault]:
    """Every residual of one size, of one width, or of one shape."""
    for level in table.levels:
        at_size = [(*shape[:2], *level.size) for shape in (*table.downs, table.mid)]
        at_width = [(shape[0], level.channels, *shape[2:]) for shape in (*table.downs, table.mid)]
        at_both = [(shape[0], level.channels, *level.size) for shape in at_size]
        yield from _for_all("constant", f"every residual has stride {level.stride}", _TABLE, at_size, table)
        yield from _for_all("constant", f"every residual has {level.channels} channels", _TABLE, at_width, table)
        told = f"every residual has {level.channels} channels and stride {level.stride}"
        yield from _for_all("constant", told, _TABLE, at_both, table)


def _for_all(kind: FaultKind, told: str, change: str, flat: Sequence[Shape], table: Table) -> Iterator[Fault]:
    """The same mistake with mid made like the others, and with mid right."""
    downs = tuple(flat[:-1])
    if Given(downs, flat[-1]) != table.right:
        yield Fault(kind, told, change, Given(downs, flat[-1]))
    if flat[-1] != table.mid and downs != table.downs:
        yield Fault(kind, f"{told}, but mid is right", change, Given(downs, table.mid))


def _rounded(table: Table) -> Iterator[Fault]:
    """Halved sizes rounded another way."""
    for own, other in (("ceil", "floor"), ("floor", "ceil")):
        flat: list[Shape] = []
        for slot in table.contract.slots:
            axes = [Dim(dim.symbol, dim.scale, tuple(other for _ in dim.halvings)) for dim in slot.skip[2:]]  # type: ignore[misc]
            flat.append((table.geometry.batch, slot.channels, *(dim.at(table.geometry.sizes) for dim in axes)))
        down = other == "floor"
        done = "down, as in height // stride" if down else "up, as in (height + 1) // 2"
        change = f"halve step by step, rounding {'up' if down else 'down'} ({own}), as the UNet does"
        if all(min(shape) for shape in flat):
            yield from _for_all("floor", f"sizes are halved rounding {done}", change, flat, table)
    flat = [_nearest(slot, shape, table) for slot, shape in zip(table.contract.slots, (*table.downs, table.mid), strict=True)]
    change = "halve step by step, rounding as the UNet does, in place of dividing by the stride"
    yield from _for_all("floor", "sizes are divided by the stride and rounded to the nearest", change, flat, table)


def _nearest(slot: Slot, shape: Shape, table: Table) -> Shape:
    return (*shape[:2], *(max(1, round(side / slot.stride)) for side in table.latent))


def _turned(table: Table) -> Iterator[Fault]:
    """Axes in another order."""
    flat, (height, width) = (*table.downs, table.mid), table.latent
    change = "give (batch, channels, height, width)"
    if height != width:
        across = [(*shape[:2], *shape[:1:-1]) for shape in flat]
        yield from _for_all("transpose", "height and width are exchanged", change, across, table)
    last = [(shape[0], *shape[2:], shape[1]) for shape in flat]
    yield from _for_all("transpose", "channels come last, as in images and in TensorFlow", change, last, table)


def _other_channels(table: Table) -> Iterator[Fault]:
    """Every residual twice as wide, or half."""
    flat, batch = (*table.downs, table.mid), table.geometry.batch
    joined = "every residual has twice the channels: two were joined along the channels (dim=1), not along the batch (dim=0)"
    yield from _for_all("channels", joined, _JOIN, [(batch, 2 * c, *size) for _, c, *size in flat], table)
    if batch % 2 == 0:
        told = f"{joined}, which leaves half the batch"
        half = [(batch // 2, 2 * c, *size) for _, c, *size in flat]
        yield from _for_all("channels", told, _JOIN, half, table)
    told = "every residual has half the channels: they were parted along the channels (dim=1), not along the batch (dim=0)"
    thin = [(batch, max(1, c // 2), *size) for _, c, *size in flat]
    yield from _for_all("channels", told, "part them along the batch: chunk(2, dim=0)", thin, table)


def _scaled(table: Table) -> Iterator[Fault]:
    """The size of every residual off by the same factor, or by a cell."""
    change = "take the size of each residual from the contract's table, in latent cells"
    flat = (*table.downs, table.mid)
    factor = table.contract.header.vae_factor
    ways: tuple[tuple[str, Callable[[int], int]], ...] = (
        (f"{factor} times the height and width: pixels were taken for latent cells", lambda side: factor * side),
        ("twice the height and width", lambda side: 2 * side),
        ("half the height and width", lambda side: max(1, side // 2)),
        ("half the height and width, rounded up", lambda side: -(-side // 2)),
    )
    for told, of in ways:
        every = [(*shape[:2], *map(of, shape[2:])) for shape in flat]
        yield from _for_all("size", f"every residual has {told}", change, every, table)
    for rows, columns in ((0, 1), (1, 0), (1, 1)):
        lost = " and ".join([*["a row"] * rows, *["a column"] * columns])
        for by, much in ((-1, "less"), (1, "more")):
            every = [(*shape[:2], max(1, shape[2] + by * rows), max(1, shape[3] + by * columns)) for shape in flat]
            yield from _for_all("size", f"every residual has {lost} {much}", change, every, table)


def _other_sizes(table: Table, hints: Hints) -> Iterator[Fault]:
    """A ControlNet that ran at another size than the UNet."""
    at, divisor = table.geometry, table.contract.divisor
    change = "give the ControlNet an image of the size that is drawn"
    for rows, columns in hints.sizes:
        for height, width in completed(rows, columns, table.latent, table.latent):
            if (height, width) != table.latent and not (height % divisor or width % divisor):
                told = f"the ControlNet ran at latents of {height}×{width}, the UNet at another size"
                yield Fault("size", told, change, right(table.contract, replace(at, height=height, width=width)))


def _other_batches(table: Table, hints: Hints) -> Iterator[Fault]:
    """A ControlNet that ran at another batch than the UNet."""
    at = table.geometry
    change = "give both the same batch: with classifier-free guidance the latents are doubled for both"
    for batch in dict.fromkeys((1, *hints.batches)):
        if batch != at.batch:
            silent = ": PyTorch adds its residuals to every image" if batch == 1 else ""
            told = f"the ControlNet ran at batch {batch}, the UNet at another{silent}"
            yield Fault("batch", told, change, right(table.contract, replace(at, batch=batch)))


def _broadcast(table: Table) -> Iterator[Fault]:
    downs, mid = table.downs, table.mid
    told = "residuals have no batch axis: PyTorch adds them to every image in silence"
    yield Fault("rank", told, "give (batch, channels, height, width)", Given(tuple(each[1:] for each in downs), mid[1:]))
    deeper = Given(tuple((1, *each) for each in downs), (1, *mid))
    yield Fault("rank", "residuals have an axis too many", "give (batch, channels, height, width)", deeper)
    if any(each[2:] != (1, 1) for each in downs):
        pooled = Given(tuple((*each[:2], 1, 1) for each in downs), (*mid[:2], 1, 1))
        change = "right for ControlNets with global_pool_conditions; else give residuals of full size"
        yield Fault("pooled", "residuals are 1×1: PyTorch adds them to every cell in silence", change, pooled)
