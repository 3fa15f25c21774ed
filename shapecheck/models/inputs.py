"""What a UNet or ControlNet takes besides residuals, read off its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shapecheck.contract import Dim, Geometry, Input, ShapecheckError
from shapecheck.contract.dims import BATCH, HEIGHT, TOKENS, WIDTH, constant
from shapecheck.models.forward_call import group_arguments

_POOLED_TEXT_WIDTH = 1280
"""Width of the pooled text embedding of SDXL and its relatives."""


Settings = Mapping[str, Any]


def unet_inputs(config: Settings, dtype: str) -> tuple[Input, ...]:
    """The base inputs of a UNet2DConditionModel, in the order of its forward.

    Source: diffusers' models/unets/unet_2d_condition.py, get_time_embed … process_encoder_hidden_states.
    Raises ShapecheckError where the configuration needs inputs that are not known here.
    """
    channels = config["in_channels"] - (4 if config.get("addition_embed_type") == "image_hint" else 0)
    found = [
        Input("sample", (BATCH, constant(channels), HEIGHT, WIDTH), dtype, "sample"),
        Input("timestep", (BATCH,), "float32", "timestep"),
    ]
    if config.get("encoder_hid_dim_type") != "image_proj":
        found.append(_text(config, dtype))
    found += _class_labels(config, dtype)
    if width := config.get("time_cond_proj_dim"):
        found.append(Input("timestep_cond", (BATCH, constant(width)), dtype, "timestep_cond"))
    return (*found, *_added(config, dtype))


def controlnet_inputs(config: Settings, dtype: str) -> tuple[Input, ...]:
    """The inputs of a ControlNet; the conditioning image is in pixels, its scale is left to the caller.

    A union ControlNet takes a flag for each kind of control too, and in a list an image for each kind that is in use: here one.
    """
    scale = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    image = (BATCH, constant(config["conditioning_channels"]), Dim("h", scale), Dim("w", scale))
    kinds = config.get("num_control_type")
    return (
        Input("sample", (BATCH, constant(config["in_channels"]), HEIGHT, WIDTH), dtype, "sample"),
        Input("timestep", (BATCH,), "float32", "timestep"),
        _text(config, dtype),
        Input("controlnet_cond", image, dtype, "controlnet_cond"),
        *([Input("control_type", (BATCH, constant(kinds)), dtype, "control_type")] if kinds else ()),
        *_class_labels(config, dtype),
        *_added(config, dtype),
    )


def adapter_input(config: Settings, dtype: str, vae_factor: int) -> Input:
    """The image a T2I-Adapter takes, in pixels."""
    image = (BATCH, constant(config["in_channels"]), Dim("h", vae_factor), Dim("w", vae_factor))
    return Input("image", image, dtype, "x")


def build_zero_arguments(inputs: tuple[Input, ...], geometry: Geometry, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a forward: zeros of the right shape, dtype and device."""
    values = [torch.zeros(each.shape_at(geometry), dtype=getattr(torch, each.dtype), device=device) for each in inputs]
    return build_controlnet_arguments({each.argument: value for each, value in zip(inputs, values, strict=True)})


def build_controlnet_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a forward, from values by `Input.argument`; a union ControlNet gets its first kind of control."""
    call = group_arguments(values)
    if "control_type" in call:
        first = torch.zeros_like(call["control_type"])
        first[:, 0] = 1
        call |= {"control_type": first, "control_type_idx": [0], "controlnet_cond": [call["controlnet_cond"]]}
    return call


def _text(config: Settings, dtype: str) -> Input:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    if not isinstance(width, int):
        width = width[0]
    return Input("encoder_hidden_states", (BATCH, TOKENS, constant(width)), dtype, "encoder_hidden_states")


def _class_labels(config: Settings, dtype: str) -> list[Input]:
    kind = config.get("class_embed_type")
    if kind is None and config.get("num_class_embeds") is not None:
        return [Input("class_labels", (BATCH,), "int64", "class_labels")]
    if kind is None:
        return []
    if kind == "timestep":
        return [Input("class_labels", (BATCH,), dtype, "class_labels")]
    if kind in ("projection", "simple_projection"):
        width = config["projection_class_embeddings_input_dim"]
    else:
        growth = 2 if config.get("time_embedding_type") == "fourier" else 4
        width = config.get("time_embedding_dim") or growth * config["block_out_channels"][0]
    return [Input("class_labels", (BATCH, constant(width)), dtype, "class_labels")]


def _added(config: Settings, dtype: str) -> list[Input]:
    """The entries of added_cond_kwargs."""
    kind = config.get("addition_embed_type")
    if kind not in _ADDED:
        raise ShapecheckError(f"addition_embed_type {kind!r} is not known; known: {', '.join(filter(None, _ADDED))}")
    widths = dict(_ADDED[kind](config))
    hidden = config.get("encoder_hid_dim_type")
    if hidden == "image_proj":
        widths.setdefault("image_embeds", (constant(config["encoder_hid_dim"]),))
    elif hidden == "text_image_proj":
        widths.setdefault("image_embeds", (constant(config["cross_attention_dim"]),))
    elif hidden not in (None, "text_proj"):
        raise ShapecheckError(
            f"encoder_hid_dim_type {hidden!r} is not known here; an IP-Adapter must be unloaded before a model is probed"
        )
    return [Input(name, (BATCH, *shape), dtype, f"added_cond_kwargs.{name}") for name, shape in widths.items()]


def _text_time(config: Settings) -> dict[str, tuple[Dim, ...]]:
    """SDXL: the projection takes the pooled text and `ids` numbers of `width` each; its input size gives their sum only.

    SDXL has 6 ids, its refiner 5 (an aesthetic score in place of a size); diffusers' pipelines tell them apart alike.
    """
    total, width = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    ids = 5 if total - 5 * width == _POOLED_TEXT_WIDTH else 6
    if total <= ids * width:
        raise ShapecheckError(
            f"projection_class_embeddings_input_dim {total} leaves no room for text_embeds beside {ids} time ids of {width}"
        )
    return {"text_embeds": (constant(total - ids * width),), "time_ids": (constant(ids),)}


def _image(config: Settings) -> dict[str, tuple[Dim, ...]]:
    return {"image_embeds": (constant(config["encoder_hid_dim"]),)}


_ADDED: Mapping[str | None, Callable[[Settings], Mapping[str, tuple[Dim, ...]]]] = {
    None: lambda config: {},
    "text": lambda config: {},
    "text_time": _text_time,
    "text_image": lambda config: dict.fromkeys(("text_embeds", "image_embeds"), (constant(config["cross_attention_dim"]),)),
    "image": _image,
    "image_hint": lambda config: _image(config) | {"hint": (constant(3), Dim("h", 8), Dim("w", 8))},
}
