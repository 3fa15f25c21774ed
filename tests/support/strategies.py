"""Hypothesis strategies: small UNet configs that diffusers builds and runs, and ControlNets with one planted fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from oracle import AVERAGE_POOLED, TAKES_UPSAMPLE_SIZE

Config = dict[str, Any]

MIRRORED = {
    "DownBlock2D": "UpBlock2D",
    "CrossAttnDownBlock2D": "CrossAttnUpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
    "SimpleCrossAttnDownBlock2D": "SimpleCrossAttnUpBlock2D",
}
"""Down block kind to the up block kind that usually stands opposite."""
CONVOLVED = tuple(kind for kind in MIRRORED if kind not in AVERAGE_POOLED)
"""Down block kinds whose downsampler is a convolution, which downsample_padding reaches."""
MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None)
CONTROLNET_MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a drawn UNet may be: time to observe one grows with levels, layers and the sizes it refuses."""

    levels: int
    layers: int


SMALL = Limits(levels=2, layers=2)
MIDDLING = Limits(levels=4, layers=2)
LARGE = Limits(levels=5, layers=3)


@dataclass(frozen=True, slots=True)
class Fault:
    """A UNet and what its ControlNet's config has otherwise than the one from_unet makes."""

    unet: Config
    changes: Config


@st.composite
def unet_configs(draw: st.DrawFn, most: Limits = LARGE) -> Config:
    """Any UNet2DConditionModel of one to five levels, a few channels wide."""
    levels = draw(st.integers(1, most.levels))
    downs = draw(_each(levels, st.sampled_from(sorted(MIRRORED))))
    count = st.integers(1, most.layers)
    layers = draw(st.one_of(count, _each(levels, count)))
    ups = draw(st.one_of(st.just(_mirrored(downs)), _each(levels, st.sampled_from(sorted(MIRRORED.values())))))
    return draw(_completed(downs, ups, draw(st.sampled_from(MID_TYPES)), layers))


@st.composite
def unet_configs_with_controlnet(
    draw: st.DrawFn, most: Limits = LARGE, *, fewest_levels: int = 1, fewest_layers: int = 1
) -> Config:
    """UNets for which ControlNetModel.from_unet works: one number of layers, a mid block a ControlNet knows."""
    levels = draw(st.integers(fewest_levels, most.levels))
    downs = draw(_each(levels, st.sampled_from(sorted(MIRRORED))))
    layers = draw(st.integers(fewest_layers, most.layers))
    ups = draw(st.sampled_from([["UpBlock2D"] * levels, _mirrored(downs)]))
    return draw(_completed(downs, ups, draw(st.sampled_from(CONTROLNET_MID_TYPES)), layers))


@st.composite
def _completed(draw: st.DrawFn, downs: list[str], ups: list[str], mid: str | None, layers: int | list[int]) -> Config:
    """The rest of a config around the given blocks."""
    groups = draw(st.sampled_from([4, 8]))
    widths = [groups * times for times in draw(_each(len(downs), st.integers(1, 4)))]
    simple = any(kind is not None and "SimpleCrossAttn" in kind for kind in (*downs, *ups, mid))
    heads = st.sampled_from([1, 2, 4]) if simple else st.integers(1, groups)  # the simple attention needs whole heads
    text = 2 * draw(st.integers(2, 8))
    return {
        "sample_size": draw(st.sampled_from([None, 32, 64])),
        "down_block_types": downs,
        "up_block_types": ups,
        "mid_block_type": mid,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "attention_head_dim": draw(st.one_of(heads, _each(len(downs), heads))),
        "cross_attention_dim": text,
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "center_input_sample": draw(st.booleans()),
        "use_linear_projection": draw(st.booleans()),
        "time_cond_proj_dim": draw(st.one_of(st.none(), st.integers(1, 8))),
        **draw(_embeddings()),
    }


def _embeddings() -> st.SearchStrategy[Config]:
    """Class labels of every kind a ControlNet has too, with and without SDXL's added embeddings."""
    time_width = st.sampled_from([2, 4])
    text_time = time_width.flatmap(
        lambda width: st.fixed_dictionaries({
            "addition_embed_type": st.just("text_time"),
            "addition_time_embed_dim": st.just(width),
            "projection_class_embeddings_input_dim": st.integers(1, 9).map(lambda pooled: 6 * width + pooled),
        })
    )  # fmt: skip
    class_labels = st.sampled_from(
        [
            {},
            {"num_class_embeds": 5},
            {"class_embed_type": "timestep"},
            {"class_embed_type": "identity"},
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 17},
        ]
    )
    return st.tuples(class_labels, st.one_of(st.just({}), text_time)).map(lambda pair: pair[0] | pair[1])


# planted faults


@st.composite
def layer_fewer(draw: st.DrawFn, most: Limits) -> Fault:
    unet = draw(unet_configs_with_controlnet(most, fewest_layers=2))
    return Fault(unet, {"layers_per_block": unet["layers_per_block"] - 1})


@st.composite
def layer_more(draw: st.DrawFn, most: Limits) -> Fault:
    unet = draw(unet_configs_with_controlnet(most))
    return Fault(unet, {"layers_per_block": unet["layers_per_block"] + 1})


@st.composite
def width_changed(draw: st.DrawFn, most: Limits) -> Fault:
    unet = draw(unet_configs_with_controlnet(most))
    widths = list(unet["block_out_channels"])
    widths[draw(st.integers(0, len(widths) - 1))] += unet["norm_num_groups"]
    return Fault(unet, {"block_out_channels": widths})


@st.composite
def padding_changed(draw: st.DrawFn, most: Limits) -> Fault:
    """At least one downsampler is a convolution, and every up block takes odd sizes: there the padding shows."""
    unet = draw(unet_configs_with_controlnet(most, fewest_levels=2))
    downs = list(unet["down_block_types"])
    downs[draw(st.integers(0, len(downs) - 2))] = draw(st.sampled_from(CONVOLVED))
    ups = draw(_each(len(downs), st.sampled_from(sorted(TAKES_UPSAMPLE_SIZE))))
    changed = {"downsample_padding": 1 - unet["downsample_padding"]}
    return Fault(unet | {"down_block_types": downs, "up_block_types": ups}, changed)


@st.composite
def level_dropped(draw: st.DrawFn, most: Limits) -> Fault:
    unet = draw(unet_configs_with_controlnet(most, fewest_levels=2))
    dropped = draw(st.integers(0, len(unet["down_block_types"]) - 1))
    per_level = ("down_block_types", "block_out_channels", "attention_head_dim")
    lists = {key: unet[key] for key in per_level if isinstance(unet[key], list)}
    return Fault(unet, {key: values[:dropped] + values[dropped + 1 :] for key, values in lists.items()})


FAULTS: Mapping[str, Callable[[Limits], st.SearchStrategy[Fault]]] = {
    "layer fewer": layer_fewer,
    "layer more": layer_more,
    "width changed": width_changed,
    "padding changed": padding_changed,
    "level dropped": level_dropped,
}


def _each(levels: int, values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=levels, max_size=levels)


def _mirrored(downs: list[str]) -> list[str]:
    return [MIRRORED[kind] for kind in reversed(downs)]
