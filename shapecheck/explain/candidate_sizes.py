"""At which latent sizes a text can have arisen, where nobody says: those at which some level has the sizes that are told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

from shapecheck.contract import Contract, Dim, Geometry
from shapecheck.explain.symptom import Symptom

_MOST = 96


_LARGEST = 2**14
"""Latent cells along a side."""


_SLIMMEST = 4
"""How many times longer one side of an image may be than the other."""


def geometries(
    symptom: Symptom, contract: Contract, usual: Geometry, *, size_known: bool, batch_known: bool
) -> tuple[Geometry, ...]:
    """`usual` first; then, unless its size is known to be the right one, every other that could have given the text."""
    batch = (None if batch_known else _batch(symptom)) or usual.batch
    usual = replace(usual, batch=batch)
    if size_known:
        return (usual,)
    fitting = (
        each for each in _sizes(symptom, contract, usual) if not (each[0] % contract.divisor or each[1] % contract.divisor)
    )
    others = (replace(usual, height=height, width=width) for height, width in fitting)
    return tuple(dict.fromkeys((usual, *islice(others, _MOST))))


_OF_ONE_IMAGE = ("concat", "attention", "reshape")
"""Kinds that batches give on the way up only where residuals made the tensors of one image larger."""


def _batch(symptom: Symptom) -> int | None:
    if symptom.kind in _OF_ONE_IMAGE or len(symptom.given_shape) == 3:
        return 1
    if symptom.kind == "broadcast" and symptom.axis == 0 and symptom.wanted:
        return symptom.wanted
    if symptom.kind in ("norm", "groups") and len(symptom.given_shape) == 5:  # two batches joined where channels are meant
        return max(1, symptom.given_shape[1] // 2)
    for shape in (symptom.wanted_shape, symptom.given_shape):
        if len(shape) == 4 and 0 < shape[0] <= _LARGEST:
            return shape[0]
    return None


def _sizes(symptom: Symptom, contract: Contract, usual: Geometry) -> Iterator[tuple[int, int]]:
    """Heights and widths of latents, in cells."""
    rows, columns = _told(symptom)
    yield from _exchanged(symptom)
    yield from _folded(symptom, contract)
    for stride, height, width in _levels(contract):
        tall = [] if rows is None else list(_before(rows, height))
        wide = [] if columns is None else list(_before(columns, width))
        if rows is not None and columns is not None:
            yield from _both(tall, wide, stride)
        elif columns is not None:
            yield from ((max(1, round(each * usual.height / usual.width)), each) for each in wide)
        elif rows is not None:
            yield from ((each, max(1, round(each * usual.width / usual.height))) for each in tall)
            if symptom.axis is not None:  # without, either side may be meant, and one in proportion stands for both
                yield from ((each, usual.width) for each in tall)


def _exchanged(symptom: Symptom) -> Iterator[tuple[int, int]]:
    """The size at which height and width, exchanged, give the text: it is about the first slot, whose stride is 1."""
    one, other = (None if size is None else _side(size) for size in (symptom.wanted, symptom.given))
    if symptom.kind == "broadcast" and symptom.axis == 3 and one and other:
        yield other, one


def _told(symptom: Symptom) -> tuple[int | None, int | None]:
    """Height and width of the UNet's own tensor, as far as a text tells."""
    if symptom.kind == "reshape" and len(symptom.wanted_shape) == 4:
        return _side(symptom.wanted_shape[1]), _side(symptom.wanted_shape[2])
    if len(symptom.wanted_shape) in (4, 5):
        return _side(symptom.wanted_shape[-2]), _side(symptom.wanted_shape[-1])
    if (symptom.kind in ("norm", "groups") and len(symptom.given_shape) in (4, 5)) or (
        symptom.kind == "upsample" and len(symptom.given_shape) > 1
    ):
        return _side(symptom.given_shape[-2]), _side(symptom.given_shape[-1])
    side = None if symptom.wanted is None else _side(symptom.wanted)
    if symptom.kind == "broadcast":
        return (side, None) if symptom.axis == 2 else (None, side) if symptom.axis == 3 else (None, None)
    if symptom.kind == "concat":
        return (None, side) if symptom.axis == 3 else (None, None) if symptom.axis == 0 else (side, None)
    return None, None


def _folded(symptom: Symptom, contract: Contract) -> Iterator[tuple[int, int]]:
    """The sizes that have as many cells at some level as the tensor that attention met, the squarest first."""
    cells = _cells(symptom)
    rows = [side for side in range(1, math.isqrt(cells) + 1) if cells % side == 0 and cells <= _SLIMMEST * side * side]
    for side in reversed(rows):
        for height, width in ((side, cells // side), (cells // side, side)):
            yield from ((height * stride, width * stride) for stride, _, _ in _levels(contract))


def _cells(symptom: Symptom) -> int:
    """Cells of the tensor that attention met, which folds the images of a larger batch into one; 0 where it met none."""
    if symptom.kind != "broadcast":
        return 0
    if len(symptom.given_shape) == 3:
        return _side(symptom.given_shape[1]) or 0
    wanted, given = symptom.wanted, symptom.given
    is_folded = symptom.axis == 1 and wanted and given and wanted > given and wanted % given == 0
    return _side(given) or 0 if given and is_folded else 0


def _side(size: int) -> int | None:
    return size if 0 < size <= _LARGEST else None


def _levels(contract: Contract) -> Iterator[tuple[int, Dim, Dim]]:
    """Stride, height and width rule of every level."""
    yield from dict.fromkeys((slot.stride, slot.skip[2], slot.skip[3]) for slot in contract.slots)


def _before(size: int, rule: Dim) -> Iterator[int]:
    """Every latent side that this rule brings to `size`."""
    for side in range(max(1, (size - 1) * rule.stride), (size + 1) * rule.stride + 1):
        try:
            if rule.at({rule.symbol or "": side}) == size and side <= _LARGEST:
                yield side
        except ValueError:  # the rounding of an odd size was never observed: the UNet refuses it
            continue


def _both(tall: list[int], wide: list[int], stride: int) -> Iterator[tuple[int, int]]:
    """Pairs of sides: every height with the widest and the other way round, and those that lie as far from a multiple."""
    if stride <= 4:
        yield from product(tall, wide)
        return
    yield from zip(tall, wide, strict=False)
    yield from ((height, wide[-1]) for height in tall if wide)
    yield from ((tall[-1], width) for width in wide if tall)
