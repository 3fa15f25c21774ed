"""What diffusers' UNet2DConditionModel does with residuals of given shapes: it runs, or fails at one place in one way.

Follows `forward` of diffusers 0.42 (models/unets/unet_2d_condition.py): the adds on the way down and after mid, and the
concatenations on the way up, which see a list of skips cut short if too few residuals were given.

This is the one exception to "observed, not assumed": hundreds of wrong tables a text, on every UNet and at many sizes, are too
many to run, and `explain` needs no torch. tests/explain/test_explain.py holds it against the real UNet, word by word:
`test_outcome_and_words_are_those_of_a_unet_without_values`, `test_every_kind_of_failure_is_foretold_word_by_word`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from shapecheck.contract import Shape
from shapecheck.explain.residual_table import ResidualShapes
from shapecheck.explain.unet_layout import UNetLayout, UpBlock

Stage = Literal["down", "mid", "feature", "up"]
"""Where in the UNet: the adds to the skips, the add after mid, the adds of T2I-Adapter features, the way up."""


Kind = Literal[
    "broadcast", "output", "concat", "rank", "norm", "groups", "index", "keyword", "attention", "reshape", "upsample"
]
"""How PyTorch fails: sizes that do not broadcast, a sum larger than what it is written to, sizes or ranks that cannot be
concatenated, channels a GroupNorm does not have or cannot divide, a list with too few skips, an argument a block does not
take, a batch that is not the text's (attention, reshape), a skip of another rank to take the size from."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that goes wrong."""

    stage: Stage
    kind: Kind
    slot: str
    """The slot whose skip or residual fails to fit; of T2I-Adapter features the number of the block."""
    module: str
    wanted: Shape
    """The UNet's own tensor; of `norm` the channels of its weight."""
    given: Shape
    axis: int = 0

    @property
    def sizes(self) -> tuple[int, int]:
        """The two sizes that do not fit, the UNet's own first."""
        return _aligned(self.wanted, self.given)[self.axis]


def simulate_call(unet: UNetLayout, given: ResidualShapes) -> Failure | None:
    """How a call with these residuals fails; None where it runs, rightly or not."""
    if given.mid is None:
        return _features(unet, given)
    added = list(zip(unet.skips, given.downs, strict=False))
    for slot, (skip, residual) in zip(unet.slots, added, strict=False):
        if skip != residual and (failure := _added("down", slot.name, slot.producer, skip, residual)):
            return failure
    name, producer = unet.slots[-1].name, unet.slots[-1].producer
    if failure := _added("mid", name, producer, unet.mid, given.mid):
        return failure
    return _way_up(unet, [_broadcast(*pair) for pair in added], _broadcast(unet.mid, given.mid))


_REMEMBERED = 2**14
"""Pairs of shapes whose comparison is kept: a few hundred tables are made of the same dozen shapes."""


def _added(stage: Stage, slot: str, module: str, skip: Shape, residual: Shape) -> Failure | None:
    axis = _clash(skip, residual)
    return None if axis is None else Failure(stage, "broadcast", slot, module, skip, residual, axis)


@lru_cache(_REMEMBERED)
def _aligned(one: Shape, other: Shape) -> list[tuple[int, int]]:
    """Sizes side by side from the last axis on, as PyTorch broadcasts them."""
    rank = max(len(one), len(other))
    return list(zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other, strict=True))


@lru_cache(_REMEMBERED)
def _clash(one: Shape, other: Shape) -> int | None:
    """The axis that PyTorch names: the last one on which two shapes do not broadcast."""
    pairs = _aligned(one, other)
    return next((axis for axis in range(len(pairs))[::-1] if pairs[axis][0] != pairs[axis][1] and 1 not in pairs[axis]), None)


def _broadcast(one: Shape, other: Shape) -> Shape:
    return one if one == other else tuple(b if a == 1 else a for a, b in _aligned(one, other))


def _features(unet: UNetLayout, given: ResidualShapes) -> Failure | None:
    """The call without a mid residual: the down residuals are added block by block, as a T2I-Adapter's are."""
    for number, (block, feature) in enumerate(zip(unet.downs, given.downs, strict=False)):
        name = f"feature {number}"
        if block.attends and block.kind != "CrossAttnDownBlock2D":
            return Failure("feature", "keyword", name, block.kind, block.skip, feature)
        if failure := _added("feature", name, block.name, block.skip, feature):
            return failure
        grown = _broadcast(block.skip, feature)
        if not block.attends and grown != block.skip:  # added in place
            return Failure("feature", "output", name, block.name, block.skip, grown)
    return None


def _way_up(unet: UNetLayout, skips: list[Shape], hidden: Shape) -> Failure | None:
    left = list(skips)
    width = unet.slots[-1].channels
    for number, block in enumerate(unet.ups):
        count, last = len(block.slots), number == len(unet.ups) - 1
        taken, left = left[-count:], left[:-count]
        if not last and not unet.doubles and not left:
            return _none_left(unet, block.slots[0], block.name)
        for index in block.slots:
            slot = unet.slots[index]
            if not taken:
                return _none_left(unet, index, block.name)
            skip = taken.pop()
            if failure := _concatenated(hidden, skip, width + slot.channels, unet.groups):
                return replace(failure, slot=slot.name, module=block.name)
            width = block.width
            hidden = (hidden[0], width, *hidden[2:])
            if block.attends and hidden[0] != unet.mid[0]:
                return _alone(block, slot.name, hidden)
        if last:
            break
        size = tuple(2 * side for side in hidden[2:]) if unet.doubles else left[-1][2:]
        if len(size) != len(hidden) - 2:
            after = unet.slots[unet.ups[number + 1].slots[0]]
            return Failure("up", "upsample", after.name, block.name, hidden[2:], size)
        hidden = (*hidden[:2], *size)
    return None


def _alone(block: UpBlock, slot: str, hidden: Shape) -> Failure:
    """Residuals of a larger batch made the image's larger than the text's, which is 1: attention folds the images into one."""
    batch, cells = hidden[0], math.prod(hidden[2:])
    if block.is_simple:
        return Failure("up", "attention", slot, block.name, (1,), (batch,))
    if cells == 1:  # which fits every image, and makes as many of each as there are
        return Failure("up", "reshape", slot, block.name, (batch, *hidden[2:], block.width), (batch * batch * block.width,))
    return Failure("up", "broadcast", slot, block.name, (1, batch * cells, block.width), (batch, cells, block.width), 1)


def _none_left(unet: UNetLayout, index: int, module: str) -> Failure:
    return Failure("up", "index", unet.slots[index].name, module, unet.skips[index], ())


def _concatenated(hidden: Shape, skip: Shape, channels: int, groups: int) -> Failure | None:
    """How the concatenation along channels, or the GroupNorm of so many channels after it, fails."""
    if len(skip) != len(hidden):
        return Failure("up", "rank", "", "", hidden, skip)
    axis = next((at for at in (0, 2, 3) if hidden[at] != skip[at]), None)
    if axis is not None:
        return Failure("up", "concat", "", "", hidden, skip, axis)
    joined = (hidden[0], hidden[1] + skip[1], *hidden[2:])
    if joined[1] % groups:
        return Failure("up", "groups", "", "", (groups,), joined)
    if joined[1] != channels:
        return Failure("up", "norm", "", "", (channels,), joined)
    return None
