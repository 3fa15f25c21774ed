"""Simulate diffusers' UNet2DConditionModel with residuals of given shapes: it runs, or fails at one place in one way.

Follows `forward` of diffusers 0.42 (models/unets/unet_2d_condition.py): the adds on the way down and after mid, and the
concatenations on the way up, which see a list of skips cut short if too few residuals were given.

This is the one exception to "observed, not assumed": hundreds of wrong tables a text, on every UNet and at many sizes, are too
many to run, and `explain` needs no torch. tests/explain/test_explain.py compares it with the real UNet, word by word:
`test_outcome_and_words_are_those_of_a_unet_without_values`, `test_every_kind_of_failure_is_foretold_word_by_word`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from shapecheck.contract import Contract, Geometry, Shape, Slot
from shapecheck.explain.residual_table import ResidualShapes

Stage = Literal["down", "mid", "feature", "up"]
"""The place in the UNet: the adds to the skips, the add after mid, the adds of T2I-Adapter features, the way up."""
FailureKind = Literal[
    "broadcast", "output", "concat", "rank", "norm", "groups", "index", "keyword", "attention", "reshape", "upsample"
]
"""The ways in which PyTorch fails: sizes that do not broadcast, a sum larger than what it is written to, sizes or ranks that
cannot be concatenated, channels that a GroupNorm does not have or cannot divide, a list with too few skips, an argument that a
block does not take, a batch that is not the text's (attention, reshape), a skip of another rank to take the size from."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that goes wrong in a call."""

    stage: Stage
    kind: FailureKind
    slot: str
    """The slot whose skip or residual does not fit; of T2I-Adapter features the number of the block."""
    module: str
    expected: Shape
    """The UNet's own tensor; for `norm` the channels of its weight."""
    actual: Shape
    axis: int = 0

    @property
    def aligned(self) -> list[tuple[int, int]]:
        """The two shapes side by side, the UNet's own first, with leading ones up to the same rank."""
        return _align(self.expected, self.actual)

    @property
    def sizes(self) -> tuple[int, int]:
        """The two sizes that do not fit, the UNet's own first."""
        return self.aligned[self.axis]


@dataclass(frozen=True, slots=True)
class UpBlock:
    """A block of the way up: the slots whose skips it concatenates, in that order, and the channels it returns."""

    name: str
    slots: tuple[int, ...]
    width: int
    kind: str


@dataclass(frozen=True, slots=True)
class DownBlock:
    """A block of the way down, and the skip that a T2I-Adapter's feature is added to."""

    name: str
    kind: str
    skip: Shape


@dataclass(frozen=True, slots=True)
class UNetLayout:
    """A UNet2DConditionModel at one geometry, as far as residuals are concerned."""

    slots: tuple[Slot, ...]
    skips: tuple[Shape, ...]
    """Of the down slots, (batch, channels, height, width)."""
    mid: Shape
    downs: tuple[DownBlock, ...]
    ups: tuple[UpBlock, ...]
    groups: int
    doubles: bool
    """True if each up block doubles the size; else it returns that of the next skip."""


def lay_out_unet(contract: Contract, geometry: Geometry) -> UNetLayout | None:
    """Return the layout, or None if the contract does not say how its UNet is built: of a file exported by others.

    Raises ShapecheckError if the UNet refuses the geometry.
    """
    contract.require(geometry)
    config, slots = contract.config, contract.slots
    widths, kinds = config.get("block_out_channels"), config.get("down_block_types")
    if not widths or not kinds or len(widths) != len(kinds) or len(slots) < 2 or any(not slot.up_block for slot in slots):
        return None
    *skips, mid = (tuple(dim.at(geometry.sizes) for dim in slot.skip) for slot in slots)

    downs = []
    for number, kind in enumerate(kinds):
        name = f"down_blocks.{number}"
        indices = [index for index, slot in enumerate(slots[:-1]) if slot.producer.startswith(f"{name}.")]
        if kind in ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"):
            # these add the feature inside, before they halve the size; the others add it to what they return
            indices = [index for index in indices if "downsamplers" not in slots[index].producer] or indices
        if indices:
            downs.append(DownBlock(name, kind, skips[indices[-1]]))

    ups = []
    up_kinds = (*(config.get("up_block_types") or ()), *[""] * len(widths))
    for number, (width, kind) in enumerate(zip(reversed(widths), up_kinds, strict=False)):
        indices = [index for index, slot in enumerate(slots[:-1]) if slot.up_block == f"up_blocks.{number}"]
        ups.append(UpBlock(f"up_blocks.{number}", tuple(reversed(indices)), width, kind))

    factor = 2 ** (len(widths) - 1)
    doubles = not (geometry.height % factor or geometry.width % factor)
    groups = config.get("norm_num_groups", 32) or 1  # 32 is diffusers' default
    return UNetLayout(slots, tuple(skips), mid, tuple(downs), tuple(ups), groups, doubles)


def simulate_call(unet: UNetLayout, residuals: ResidualShapes) -> Failure | None:
    """Return how a call with these residuals fails, or None if it runs, rightly or not."""
    if residuals.mid is None:
        return _simulate_features(unet, residuals)
    sums = list(zip(unet.skips, residuals.downs, strict=False))
    for slot, (skip, residual) in zip(unet.slots, sums, strict=False):
        if skip != residual and (failure := _check_sum("down", slot.name, slot.producer, skip, residual)):
            return failure
    mid = unet.slots[-1]
    if failure := _check_sum("mid", mid.name, mid.producer, unet.mid, residuals.mid):
        return failure
    return _simulate_way_up(unet, [broadcast(*pair) for pair in sums], broadcast(unet.mid, residuals.mid))


# A few hundred tables are made of the same dozen shapes, so that comparisons of pairs are worth keeping.
_MOST_PAIRS = 2**14


@lru_cache(_MOST_PAIRS)
def _align(one: Shape, other: Shape) -> list[tuple[int, int]]:
    rank = max(len(one), len(other))
    return list(zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other, strict=True))


@lru_cache(_MOST_PAIRS)
def find_clash(one: Shape, other: Shape) -> int | None:
    """Return the axis that PyTorch names: the last one on which two shapes do not broadcast."""
    pairs = _align(one, other)
    return next((axis for axis in range(len(pairs))[::-1] if pairs[axis][0] != pairs[axis][1] and 1 not in pairs[axis]), None)


def broadcast(one: Shape, other: Shape) -> Shape:
    """Return the shape of the sum of two tensors that do not clash."""
    return one if one == other else tuple(b if a == 1 else a for a, b in _align(one, other))


def _check_sum(stage: Stage, slot: str, module: str, skip: Shape, residual: Shape) -> Failure | None:
    axis = find_clash(skip, residual)
    return None if axis is None else Failure(stage, "broadcast", slot, module, skip, residual, axis)


def _simulate_features(unet: UNetLayout, residuals: ResidualShapes) -> Failure | None:
    """Simulate a call without a mid residual: down residuals are then added block by block, as a T2I-Adapter's are."""
    for number, (block, feature) in enumerate(zip(unet.downs, residuals.downs, strict=False)):
        name = f"feature {number}"
        if block.kind == "SimpleCrossAttnDownBlock2D":
            return Failure("feature", "keyword", name, block.kind, block.skip, feature)
        if failure := _check_sum("feature", name, block.name, block.skip, feature):
            return failure
        total = broadcast(block.skip, feature)
        if block.kind != "CrossAttnDownBlock2D" and total != block.skip:  # added in place
            return Failure("feature", "output", name, block.name, block.skip, total)
    return None


def _simulate_way_up(unet: UNetLayout, skips: list[Shape], hidden: Shape) -> Failure | None:
    width = unet.slots[-1].channels
    for number, block in enumerate(unet.ups):
        count, is_last = len(block.slots), number == len(unet.ups) - 1
        popped, skips = skips[-count:], skips[:-count]
        # the block reads the size to return from the next skip before it concatenates its own
        if not is_last and not unet.doubles and not skips:
            popped = []
        for index in block.slots:
            slot = unet.slots[index]
            if not popped:
                return Failure("up", "index", slot.name, block.name, unet.skips[index], ())
            skip = popped.pop()
            if failure := _check_concat(hidden, skip, width + slot.channels, unet.groups):
                return replace(failure, slot=slot.name, module=block.name)
            width = block.width
            hidden = (hidden[0], width, *hidden[2:])
            if "Attn" in block.kind and hidden[0] != unet.mid[0]:
                return _fail_at_attention(block, slot.name, hidden)
        if is_last:
            break
        size = tuple(2 * side for side in hidden[2:]) if unet.doubles else skips[-1][2:]
        if len(size) != len(hidden) - 2:
            next_slot = unet.slots[unet.ups[number + 1].slots[0]]
            return Failure("up", "upsample", next_slot.name, block.name, hidden[2:], size)
        hidden = (*hidden[:2], *size)
    return None


def _fail_at_attention(block: UpBlock, slot: str, hidden: Shape) -> Failure:
    """Return how attention fails if residuals made more images than the one of the text: it folds the images into one."""
    batch, cells = hidden[0], math.prod(hidden[2:])
    if "Simple" in block.kind:  # it attends to text and image together, as Kandinsky's do
        return Failure("up", "attention", slot, block.name, (1,), (batch,))
    if cells == 1:  # one cell fits every image, and makes as many of each as there are
        return Failure("up", "reshape", slot, block.name, (batch, *hidden[2:], block.width), (batch * batch * block.width,))
    return Failure("up", "broadcast", slot, block.name, (1, batch * cells, block.width), (batch, cells, block.width), 1)


def _check_concat(hidden: Shape, skip: Shape, channels: int, groups: int) -> Failure | None:
    """Return how the concatenation along channels fails, or the GroupNorm after it, which has that many channels."""
    if len(skip) != len(hidden):
        return Failure("up", "rank", "", "", hidden, skip)
    axis = next((axis for axis in (0, 2, 3) if hidden[axis] != skip[axis]), None)
    if axis is not None:
        return Failure("up", "concat", "", "", hidden, skip, axis)
    total = (hidden[0], hidden[1] + skip[1], *hidden[2:])
    if total[1] % groups:
        return Failure("up", "groups", "", "", (groups,), total)
    return Failure("up", "norm", "", "", (channels,), total) if total[1] != channels else None
