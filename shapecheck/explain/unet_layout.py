"""Where a UNet's skips go: what is added to what and what is concatenated to what, at one geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry, Shape, Slot

_WITH_ATTENTION = ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")


_GROUPS = 32
"""diffusers' own norm_num_groups, where a config does not say."""


@dataclass(frozen=True, slots=True)
class UpBlock:
    """A block of the way up: the slots whose skips it concatenates, in that order, and the channels it makes."""

    name: str
    slots: tuple[int, ...]
    width: int
    kind: str

    @property
    def attends(self) -> bool:
        """Whether it looks at the text."""
        return "Attn" in self.kind

    @property
    def is_simple(self) -> bool:
        """Whether text and image are attended to together, as in Kandinsky."""
        return "Simple" in self.kind


@dataclass(frozen=True, slots=True)
class DownBlock:
    """A block of the way down, as a T2I-Adapter's feature meets it."""

    name: str
    kind: str
    skip: Shape
    """What the feature is added to."""

    @property
    def attends(self) -> bool:
        """Whether it looks at the text: the feature is then added inside it, else to what it returns."""
        return self.kind in _WITH_ATTENTION


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
    """Whether each up block doubles the size; else it takes that of the skip to come."""


def lay_out_unet(contract: Contract, geometry: Geometry) -> UNetLayout | None:
    """None where the contract does not say how its UNet is built: a file of others, without a config.

    Raises ShapecheckError where the UNet refuses the geometry.
    """
    contract.require(geometry)
    config, slots = contract.config, contract.slots
    widths, kinds = config.get("block_out_channels"), config.get("down_block_types")
    if not widths or not kinds or len(widths) != len(kinds) or len(slots) < 2 or any(not slot.up_block for slot in slots):
        return None
    *skips, mid = (tuple(dim.at(geometry.sizes) for dim in slot.skip) for slot in slots)
    factor = 2 ** (len(widths) - 1)
    return UNetLayout(
        slots,
        tuple(skips),
        mid,
        tuple(_downs(slots, skips, kinds)),
        tuple(_ups(slots, widths, config.get("up_block_types") or ())),
        config.get("norm_num_groups", _GROUPS) or 1,
        not (geometry.height % factor or geometry.width % factor),
    )


def _downs(slots: tuple[Slot, ...], skips: list[Shape], kinds: tuple[str, ...]) -> Iterator[DownBlock]:
    for number, kind in enumerate(kinds):
        name = f"down_blocks.{number}"
        own = [index for index, slot in enumerate(slots[:-1]) if slot.producer.startswith(f"{name}.")]
        inner = [index for index in own if "downsamplers" not in slots[index].producer]
        at = (inner or own) if kind in _WITH_ATTENTION else own
        if at:
            yield DownBlock(name, kind, skips[at[-1]])


def _ups(slots: tuple[Slot, ...], widths: tuple[int, ...], kinds: tuple[str, ...]) -> Iterator[UpBlock]:
    for number, width in enumerate(reversed(widths)):
        name = f"up_blocks.{number}"
        taken = [index for index, slot in enumerate(slots[:-1]) if slot.up_block == name]
        yield UpBlock(name, tuple(reversed(taken)), width, kinds[number] if number < len(kinds) else "")
