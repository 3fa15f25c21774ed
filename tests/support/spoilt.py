"""Right tables of residuals spoilt by one fault, written apart from the code under test; and what a real UNet makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import oracle
import torch
from hypothesis import strategies as st

Shape = tuple[int, ...]
DEEPEST = 8


@dataclass(frozen=True)
class Spoilt:
    """Residuals with one fault in them."""

    kind: str
    downs: tuple[Shape, ...]
    mid: Shape | None


def right(config, batch: int, height: int, width: int) -> tuple[list[Shape], Shape]:
    *downs, mid = oracle.shapes(config, batch, height, width).values()
    return downs, mid


@st.composite
def spoilt(draw: st.DrawFn, config, batch: int, height: int, width: int, kinds: tuple[str, ...]) -> Spoilt:
    """A right table with a fault of one of these kinds."""
    downs, mid = right(config, batch, height, width)
    kind = draw(st.sampled_from(kinds))
    return Spoilt(kind, *_MAKERS[kind](draw, downs, mid, config, (batch, height, width)))


def _drop(draw, downs, mid, config, at):
    index = draw(st.integers(0, len(downs) - 1))
    return tuple(downs[:index] + downs[index + 1 :]), mid


def _duplicate(draw, downs, mid, config, at):
    index = draw(st.integers(0, len(downs) - 1))
    return (*downs[:index], downs[index], *downs[index:]), mid


def _swap(draw, downs, mid, config, at):
    pairs = [(one, other) for one in range(len(downs)) for other in range(one) if downs[one] != downs[other]]
    one, other = draw(st.sampled_from(pairs))
    downs = list(downs)
    downs[one], downs[other] = downs[other], downs[one]
    return tuple(downs), mid


def _reverse(draw, downs, mid, config, at):
    return tuple(downs[::-1]), mid


def _shift(draw, downs, mid, config, at):
    by = draw(st.integers(1, len(downs) - 1))
    early, late, turned = downs[by:], downs[:1] * by + downs[:-by], downs[-by:] + downs[:-by]
    return tuple(draw(st.sampled_from([early, late, turned]))), mid


def _width(draw, downs, mid, config, at):
    flat = [*downs, mid]
    index = draw(st.integers(0, len(flat) - 1))
    old = flat[index]
    width = draw(st.integers(1, 2000).filter(lambda width: width != old[1]))
    flat[index] = (old[0], width, *old[2:])
    return tuple(flat[:-1]), flat[-1]


def _stride(draw, downs, mid, config, at):
    flat = [*downs, mid]
    index = draw(st.integers(0, len(flat) - 1))
    own = flat[index][2:]
    others = sorted({shape[2:] for shape in flat} | {(2 * at[1], 2 * at[2]), (own[0] + 1, own[1]), (own[0], own[1] + 3)})
    size = draw(st.sampled_from([other for other in others if other != own]))
    flat[index] = (*flat[index][:2], *size)
    return tuple(flat[:-1]), flat[-1]


def _constant(draw, downs, mid, config, at):
    size = draw(st.sampled_from(sorted({shape[2:] for shape in downs})))
    small_mid = draw(st.booleans())
    return tuple((*shape[:2], *size) for shape in downs), mid if small_mid else (*mid[:2], *size)


def _floor(draw, downs, mid, config, at):
    strides = [slot.stride for slot in oracle.slots(config)]
    flat = [(*shape[:2], at[1] // stride, at[2] // stride) for shape, stride in zip([*downs, mid], strides, strict=True)]
    return tuple(flat[:-1]), flat[-1]


def _mid(draw, downs, mid, config, at):
    forgotten, repeated = (tuple(downs), None), ((*downs, mid), mid)
    other = (tuple(downs), draw(st.sampled_from([each for each in downs if each != mid])))
    flat = [mid, *downs] if draw(st.booleans()) else [*downs, mid]
    by = draw(st.integers(0, 1))
    split = (tuple(flat[by : by - 1 or None][: len(downs)]), flat[by - 1])
    ways = [forgotten, repeated, other, *([split] if split != (tuple(downs), mid) else [])]
    return draw(st.sampled_from(ways))


def _surplus(draw, downs, mid, config, at):
    return (*downs, downs[-1]), mid


def _batch(draw, downs, mid, config, at):
    """Of one residual, or of all."""
    flat, other = [*downs, mid], draw(st.integers(1, 4).filter(lambda batch: batch != at[0]))
    one = draw(st.integers(0, len(flat) - 1) | st.none())
    flat = [(other, *shape[1:]) if one in (None, index) else shape for index, shape in enumerate(flat)]
    return tuple(flat[:-1]), flat[-1]


def _rank(draw, downs, mid, config, at):
    flat, more = [*downs, mid], draw(st.booleans())
    one = draw(st.integers(0, len(flat) - 1) | st.none())
    changed = [(1, *shape) if more else shape[1:] for shape in flat]
    flat = [changed[index] if one in (None, index) else shape for index, shape in enumerate(flat)]
    return tuple(flat[:-1]), flat[-1]


def _transpose(draw, downs, mid, config, at):
    orders = [(0, 2, 3, 1), *([(0, 1, 3, 2)] if at[1] != at[2] else [])]
    order = draw(st.sampled_from(orders))
    flat = [tuple(shape[axis] for axis in order) for shape in (*downs, mid)]
    return tuple(flat[:-1]), flat[-1]


def _channels(draw, downs, mid, config, at):
    """Joined or parted along the wrong axis."""
    joined = [torch.cat([torch.empty(shape, device="meta")] * 2, dim=1).shape for shape in (*downs, mid)]
    parted = [torch.empty(shape, device="meta").chunk(2, dim=1)[0].shape for shape in (*downs, mid)]
    flat = [tuple(shape) for shape in draw(st.sampled_from([joined, parted]))]
    return tuple(flat[:-1]), flat[-1]


def _size(draw, downs, mid, config, at):
    """Every residual of another size: a ControlNet that ran at one, or sizes off by a factor or a cell."""
    flat, factor = [*downs, mid], draw(st.sampled_from([2, 8]))
    of = draw(
        st.sampled_from(
            [
                lambda height, width: (factor * height, factor * width),
                lambda height, width: (height, width + 1),
                lambda height, width: (height + 1, width),
            ]
        )
    )
    flat = [(*shape[:2], *of(*shape[2:])) for shape in flat]
    return tuple(flat[:-1]), flat[-1]


_MAKERS: dict[str, Callable] = {
    "drop": _drop, "duplicate": _duplicate, "swap": _swap, "reverse": _reverse, "shift": _shift, "width": _width,
    "stride": _stride, "constant": _constant, "floor": _floor, "mid": _mid, "surplus": _surplus,
    "batch": _batch, "rank": _rank, "transpose": _transpose, "channels": _channels, "size": _size,
}  # fmt: skip
KINDS = tuple(_MAKERS)


def text_of(unet, batch: int, height: int, width: int, downs, mid, *, text_width: int = 12) -> str | None:
    """What a real UNet raises with residuals of these shapes; None where it runs."""
    device = next(unet.parameters()).device

    def zeros(shape):
        return None if shape is None else torch.zeros(shape, device=device)

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            unet(
                zeros((batch, 4, height, width)),
                torch.ones((), device=device),
                zeros((batch, 7, text_width)),
                down_block_additional_residuals=[zeros(shape) for shape in downs],
                mid_block_additional_residual=zeros(mid),
            )
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        return str(error)
    return None
