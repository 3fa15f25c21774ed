"""The slots of a UNet2DConditionModel in closed form, written from diffusers' source; never imports shapecheck.

Read in diffusers 0.42.1: models/unets/unet_2d_condition.py (forward), unet_2d_blocks.py (get_down_block, get_up_block),
downsampling.py (Downsample2D) and resnet.py (ResnetBlock2D with down=True).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]
Halving = Literal["ceil", "floor"]

MID = "mid_block_residual"

AVERAGE_POOLED = frozenset({"ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"})
"""Down blocks whose downsampler is a ResnetBlock2D(down=True): AvgPool2d(2, 2), so downsample_padding never reaches it."""

ATTENDED = frozenset({"AttnDownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"})
"""Down blocks whose layers end in an attention."""

TAKES_UPSAMPLE_SIZE = frozenset({"UpBlock2D", "CrossAttnUpBlock2D"})
"""Up blocks that pass upsample_size on to their upsampler; all others double."""

_COMPARED_SIZES = range(16, 150)


@dataclass(frozen=True, slots=True)
class Expected:
    """One slot as the closed form has it."""

    name: str
    channels: int
    halvings: tuple[Halving, ...]
    """One entry for each downsampler above the slot, outermost first."""
    producer: str
    up_block: str

    @property
    def stride(self) -> int:
        return 2 ** len(self.halvings)

    def size(self, cells: int) -> int:
        """Slot cells along a side of `cells` latent cells."""
        return _halved(cells, self.halvings)

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.size(height), self.size(width)


def slots(config: Config) -> list[Expected]:
    """conv_in, then per level its layers and, unless it is the last, its downsampler; mid at the end."""
    kinds, widths, layers = config["down_block_types"], config["block_out_channels"], layers_per_level(config)
    halvings = _halvings(config)
    rows: list[tuple[int, tuple[Halving, ...], str]] = [(widths[0], (), "conv_in")]
    for level, (kind, width, count) in enumerate(zip(kinds, widths, layers, strict=True)):
        part = "attentions" if kind in ATTENDED else "resnets"
        rows += [(width, halvings[:level], f"down_blocks.{level}.{part}.{layer}") for layer in range(count)]
        if level < len(kinds) - 1:
            rows.append((width, halvings[: level + 1], f"down_blocks.{level}.downsamplers.0"))
    takers = _takers(layers)
    named = [Expected(down_name(index), *row, takers[index]) for index, row in enumerate(rows)]
    mid_producer = rows[-1][2] if mid_block_type(config) is None else "mid_block"
    return [*named, Expected(MID, widths[-1], halvings, mid_producer, "up_blocks.0")]


def shapes(config: Config, batch: int, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
    """Slot name to exact shape for one latent size."""
    return {slot.name: slot.shape(batch, height, width) for slot in slots(config)}


def refuses(config: Config, height: int, width: int) -> bool:
    """Whether the UNet fails at this size: some up block doubles where the level it goes to has an odd side."""
    halvings = _halvings(config)
    return any(
        _halved(side, halvings[:level]) % 2 for level in _doubled_levels(config) for side in (height, width)
    )  # fmt: skip


def divisor(config: Config) -> int:
    """The smallest number whose every multiple the UNet runs at: twice the stride of the deepest level doubled to."""
    return max((2 ** (level + 1) for level in _doubled_levels(config)), default=1)


def wrong_slots(unet: Config, controlnet: Config) -> set[str]:
    """Names where the residuals of a ControlNet do not fit at some size the UNet runs at: differing, missing, surplus."""
    takes, emits = ({slot.name: slot for slot in slots(config)} for config in (unet, controlnet))
    sides = [side for side in _COMPARED_SIZES if side % divisor(unet) == 0]
    differing = {name for name in takes.keys() & emits.keys() if not _fit(takes[name], emits[name], sides)}
    return differing | (takes.keys() ^ emits.keys())


def implies_controlnet(config: Config) -> bool:
    """Whether ControlNetModel.from_unet builds: it knows two kinds of mid block and no list of layers."""
    return isinstance(config.get("layers_per_block", 2), int) and mid_block_type(config) in (
        "UNetMidBlock2DCrossAttn",
        "UNetMidBlock2D",
    )


def down_name(index: int) -> str:
    return f"down_block_residual_{index:02d}"


def layers_per_level(config: Config) -> Sequence[int]:
    layers = config.get("layers_per_block", 2)
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else layers


def mid_block_type(config: Config) -> str | None:
    """None, written out, means no mid block; an absent key is diffusers' default."""
    return config.get("mid_block_type", "UNetMidBlock2DCrossAttn")


def _halvings(config: Config) -> tuple[Halving, ...]:
    """How each downsampler treats an odd side.

    Downsample2D with padding 1: (h + 2 - 3) // 2 + 1 = ceil(h / 2). With padding 0 it pads one cell at the end:
    (h + 1 - 3) // 2 + 1 = floor(h / 2). AvgPool2d(2, 2): floor(h / 2).
    """
    valid = config.get("downsample_padding", 1) == 0
    return tuple("floor" if valid or kind in AVERAGE_POOLED else "ceil" for kind in config["down_block_types"][:-1])


def _halved(cells: int, halvings: Sequence[Halving]) -> int:
    for halving in halvings:
        cells = (cells + 1) // 2 if halving == "ceil" else cells // 2
    return cells


def _takers(layers: Sequence[int]) -> list[str]:
    """The up block of each down slot: block i pops one more than the layers of the level it mirrors, from the end."""
    popped = [f"up_blocks.{number}" for number, count in enumerate(reversed(layers)) for _ in range(count + 1)]
    return popped[::-1]


def _doubled_levels(config: Config) -> list[int]:
    """Levels that are reached by exact doubling; the last up block has no upsampler."""
    last = len(config["up_block_types"]) - 1
    return [last - 1 - number for number, kind in enumerate(config["up_block_types"][:-1]) if kind not in TAKES_UPSAMPLE_SIZE]


def _fit(taken: Expected, given: Expected, sides: Sequence[int]) -> bool:
    return taken.channels == given.channels and all(taken.size(side) == given.size(side) for side in sides)
