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
    others = sorted({shape[2:] for shape in flat} | {(2 * at[1], 2 * at[2])} - {flat[index][2:]})
    size = draw(st.sampled_from([other for other in others if other != flat[index][2:]]))
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
    forgotten, repeated, first = (tuple(downs), None), ((*downs, mid), mid), (tuple(downs), downs[0])
    return draw(st.sampled_from([forgotten, repeated, first]))


def _surplus(draw, downs, mid, config, at):
    return (*downs, downs[-1]), mid


_MAKERS: dict[str, Callable] = {
    "drop": _drop, "duplicate": _duplicate, "swap": _swap, "reverse": _reverse, "shift": _shift, "width": _width,
    "stride": _stride, "constant": _constant, "floor": _floor, "mid": _mid, "surplus": _surplus,
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
    except (RuntimeError, IndexError, TypeError) as error:
        return str(error)
    return None
