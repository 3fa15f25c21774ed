"""Candidate latent sizes of a text, if nobody says its size: those at which some level has the sizes in the text."""

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


def candidate_geometries(
    symptom: Symptom, contract: Contract, usual: Geometry, *, size_known: bool, batch_known: bool
) -> tuple[Geometry, ...]:
    """Return `usual`; then, unless its size is known to be the right one, others at which the text can have arisen."""
    usual = replace(usual, batch=(None if batch_known else _find_batch(symptom)) or usual.batch)
    if size_known:
        return (usual,)
    others = (
        replace(usual, height=height, width=width)
        for height, width in _candidate_sizes(symptom, contract, usual)
        if 0 < height <= _LARGEST and 0 < width <= _LARGEST and not (height % contract.divisor or width % contract.divisor)
    )
    return tuple(dict.fromkeys((usual, *islice(others, _MOST))))


def _find_batch(symptom: Symptom) -> int | None:
    # batches clash on the way up only if residuals made the tensors of one image larger
    if symptom.kind in ("concat", "attention", "reshape") or len(symptom.actual_shape) == 3:
        return 1
    if symptom.kind == "broadcast" and symptom.axis == 0 and symptom.expected:
        return symptom.expected
    if symptom.kind in ("norm", "groups") and len(symptom.actual_shape) == 5:  # two batches joined where channels are meant
        return max(1, symptom.actual_shape[1] // 2)
    batches = (shape[0] for shape in (symptom.expected_shape, symptom.actual_shape) if len(shape) == 4)
    return next((batch for batch in batches if 0 < batch <= _LARGEST), None)


def _candidate_sizes(symptom: Symptom, contract: Contract, usual: Geometry) -> Iterator[tuple[int, int]]:
    """Yield heights and widths of latents, in cells, the likelier first."""
    levels = tuple(dict.fromkeys((slot.stride, slot.skip[2], slot.skip[3]) for slot in contract.slots))
    if symptom.kind == "broadcast" and symptom.axis == 3 and symptom.expected and symptom.actual:
        yield symptom.actual, symptom.expected  # height and width exchanged show at the first slot, whose stride is 1

    cells = _count_cells(symptom)  # the squarest size of so many cells comes first
    for side in range(math.isqrt(cells), 0, -1):
        if cells % side == 0 and cells <= _SLIMMEST * side * side:
            for height, width in ((side, cells // side), (cells // side, side)):
                yield from ((height * stride, width * stride) for stride, _, _ in levels)

    # a free axis is -1 in a shape, and says as little as a size that no latent has
    rows, columns = (side if side and 0 < side <= _LARGEST else None for side in _size_in_text(symptom))
    for stride, height_rule, width_rule in levels:
        tall = [] if rows is None else _sides_before(rows, height_rule)
        wide = [] if columns is None else _sides_before(columns, width_rule)
        if rows is not None and columns is not None:
            if stride <= 4:
                yield from product(tall, wide)
            elif tall and wide:  # too many pairs: sides as far from a multiple, then each with the largest
                yield from zip(tall, wide, strict=False)
                yield from ((height, wide[-1]) for height in tall)
                yield from ((tall[-1], width) for width in wide)
            continue
        yield from ((max(1, round(width * usual.height / usual.width)), width) for width in wide)
        yield from ((height, max(1, round(height * usual.width / usual.height))) for height in tall)
        if symptom.axis is not None:  # without, either side may be meant, and one in proportion stands for both
            yield from ((height, usual.width) for height in tall)


def _count_cells(symptom: Symptom) -> int:
    """Return the cells of the tensor that attention met, which folds the images of a larger batch into one; else 0."""
    if symptom.kind != "broadcast":
        return 0
    expected, cells = symptom.expected, symptom.actual or 0
    if len(symptom.actual_shape) == 3:
        cells = symptom.actual_shape[1]
    elif not (symptom.axis == 1 and expected and cells and expected > cells and expected % cells == 0):
        return 0
    return cells if 0 < cells <= _LARGEST else 0


def _size_in_text(symptom: Symptom) -> tuple[int | None, int | None]:
    """Return height and width of the UNet's own tensor, as far as a text shows them."""
    kind, axis, shape = symptom.kind, symptom.axis, symptom.expected_shape
    if kind == "reshape" and len(shape) == 4:
        return shape[1], shape[2]  # the channels are last
    if len(shape) not in (4, 5) and kind in ("norm", "groups", "upsample"):
        shape = symptom.actual_shape
    if len(shape) in (4, 5) or (kind == "upsample" and len(shape) > 1):
        return shape[-2], shape[-1]
    if kind == "broadcast" and axis in (2, 3):
        return (symptom.expected, None) if axis == 2 else (None, symptom.expected)
    if kind == "concat" and axis != 0:
        return (None, symptom.expected) if axis == 3 else (symptom.expected, None)
    return None, None


def _sides_before(size: int, rule: Dim) -> list[int]:
    """Return every latent side that this rule turns into `size`."""
    sides = []
    for side in range(max(1, (size - 1) * rule.stride), min((size + 1) * rule.stride, _LARGEST) + 1):
        try:
            if rule.at({rule.symbol or "": side}) == size:
                sides.append(side)
        except ValueError:  # the rounding of an odd size was never observed: the UNet refuses it
            continue
    return sides
