"""The layout of a UNet's skips: what is added to what and what is concatenated to what, at one geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shapecheck.contract import Contract, Geometry, Shape, Slot


@dataclass(frozen=True, slots=True)
class UpBlock:
    """A block of the way up: the slots whose skips it concatenates, in that order, and the channels it returns."""

    name: str
    slots: tuple[int, ...]
    width: int
    kind: str

    @property
    def attends(self) -> bool:
        return "Attn" in self.kind

    @property
    def is_simple(self) -> bool:
        """Whether it attends to text and image together, as Kandinsky's do."""
        return "Simple" in self.kind


@dataclass(frozen=True, slots=True)
class DownBlock:
    """A block of the way down, and the skip that a T2I-Adapter's feature is added to."""

    name: str
    kind: str
    skip: Shape

    @property
    def attends(self) -> bool:
        """Whether the feature is added inside it, and not to what it returns."""
        return self.kind in ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")


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
    """Whether each up block doubles the size; else it returns that of the next skip."""


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
    factor = 2 ** (len(widths) - 1)
    return UNetLayout(
        slots,
        tuple(skips),
        mid,
        tuple(_list_down_blocks(slots, skips, kinds)),
        tuple(_list_up_blocks(slots, widths, config.get("up_block_types") or ())),
        config.get("norm_num_groups", 32) or 1,  # diffusers' own default
        not (geometry.height % factor or geometry.width % factor),
    )


def _list_down_blocks(slots: tuple[Slot, ...], skips: list[Shape], kinds: tuple[str, ...]) -> Iterator[DownBlock]:
    for number, kind in enumerate(kinds):
        block = DownBlock(f"down_blocks.{number}", kind, ())
        own = [index for index, slot in enumerate(slots[:-1]) if slot.producer.startswith(f"{block.name}.")]
        layers = [index for index in own if "downsamplers" not in slots[index].producer]
        if block.attends and layers:
            own = layers
        if own:
            yield DownBlock(block.name, kind, skips[own[-1]])


def _list_up_blocks(slots: tuple[Slot, ...], widths: tuple[int, ...], kinds: tuple[str, ...]) -> Iterator[UpBlock]:
    for number, width in enumerate(reversed(widths)):
        name = f"up_blocks.{number}"
        own = [index for index, slot in enumerate(slots[:-1]) if slot.up_block == name]
        yield UpBlock(name, tuple(reversed(own)), width, kinds[number] if number < len(kinds) else "")
