"""Whole tables made by a wrong rule: channels per block, one size for all, another rounding, another model's table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from shapecheck import presets
from shapecheck.contract import Contract, Dim, Shape, ShapecheckError
from shapecheck.faults.fault import Fault
from shapecheck.faults.given import Given, right
from shapecheck.faults.hints import Hints, completed
from shapecheck.faults.table import Level, Size, Table

_TABLE = "take channels and size of each residual from the contract's table, one row a slot"
_REPEATS = (1, 2, 3, 4)


def rules(table: Table, hints: Hints) -> Iterator[Fault]:
    """Every wrong rule there is a name for; sizes and batches are those of the UNet and of the hints."""
    yield from _blocks(table)
    yield from _layers(table)
    yield from _families(table)
    yield from _constant(table)
    yield from _rounded(table)
    yield from _turned(table)
    yield from _other_sizes(table, hints)
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
    for names, contract in _distinct():
        tables.setdefault(_their_table(contract, table), []).extend(names)
    for given, alike in tables.items():
        if given != table.right:
            told = f"this is the table of {', '.join(alike[:4])}{', …' * (len(alike) > 4)}"
            yield Fault("family", told, "take a ControlNet made for this UNet, or the UNet it was made for", given)


@cache
def _distinct() -> tuple[tuple[tuple[str, ...], Contract], ...]:
    """Presets whose slots differ, each with the names of all that share them."""
    groups: dict[object, list[str]] = {}
    for name, contract in presets.contracts().items():
        groups.setdefault(tuple(slot.shape for slot in contract.slots), []).append(name)
    return tuple((tuple(sorted(names, key=len)), presets.contract(names[0])) for names in groups.values())


def _their_table(contract: Contract, table: Table) -> Given:
    try:
        return right(contract, table.geometry)
    except ShapecheckError:  # a size their UNet refuses: nothing stops a ControlNet from emitting it
        return right(replace(contract, divisor=1), table.geometry)


def _constant(table: Table) -> Iterator[Fault]:
    """Every residual at one size."""
    for level in table.levels:
        downs = tuple((*shape[:2], *level.size) for shape in table.downs)
        told = f"every residual has stride {level.stride}"
        for mid, of_mid in ((table.mid, ", but mid is right"), ((*table.mid[:2], *level.size), "")):
            if Given(downs, mid) != table.right:
                yield Fault("constant", told + of_mid, _TABLE, Given(downs, mid))


def _rounded(table: Table) -> Iterator[Fault]:
    """Halved sizes rounded the other way."""
    for own, other in (("ceil", "floor"), ("floor", "ceil")):
        shapes = []
        for slot in table.contract.slots:
            axes = [Dim(dim.symbol, dim.scale, tuple(other for _ in dim.halvings)) for dim in slot.skip[2:]]  # type: ignore[misc]
            shapes.append((table.geometry.batch, slot.channels, *(dim.at(table.geometry.sizes) for dim in axes)))
        given = Given(tuple(shapes[:-1]), shapes[-1])
        if given != table.right and all(min(shape) for shape in shapes):
            down = other == "floor"
            done = "down, as in height // stride" if down else "up, as in (height + 1) // 2"
            change = f"halve step by step, rounding {'up' if down else 'down'} ({own}), as the UNet does"
            yield Fault("floor", f"sizes are halved rounding {done}", change, given)


def _turned(table: Table) -> Iterator[Fault]:
    height, width = table.latent
    if height != width:
        downs = tuple((*shape[:2], *shape[:1:-1]) for shape in table.downs)
        change = "give (batch, channels, height, width)"
        yield Fault("transpose", "height and width are exchanged", change, Given(downs, (*table.mid[:2], *table.mid[:1:-1])))


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
