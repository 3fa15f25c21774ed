"""The inputs of a UNet or ControlNet besides residuals, read off its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shapecheck.contract import Dim, Geometry, Input, ShapecheckError
from shapecheck.contract.dims import BATCH, HEIGHT, TOKENS, WIDTH, constant
from shapecheck.models.forward_call import group_arguments

_ADDITIONS = ("text", "text_time", "text_image", "image", "image_hint")
_TIME_IDS = (6, 5)
"""SDXL's time ids, and its refiner's, which have an aesthetic score in place of a size."""
_SDXL_POOLED = 1280


def unet_inputs(config: Mapping[str, Any], dtype: str) -> tuple[Input, ...]:
    """Return the base inputs of a UNet2DConditionModel, in the order of its forward.

    Source: diffusers' models/unets/unet_2d_condition.py, get_time_embed … process_encoder_hidden_states.
    Raises ShapecheckError if the configuration needs inputs that are not known here.
    """
    channels = config["in_channels"] - (4 if config.get("addition_embed_type") == "image_hint" else 0)
    inputs = [
        Input("sample", (BATCH, constant(channels), HEIGHT, WIDTH), dtype, "sample"),
        Input("timestep", (BATCH,), "float32", "timestep"),
    ]
    if _takes_text(config):
        inputs.append(_text_input(config, dtype))
    inputs += _class_label_inputs(config, dtype)
    if width := config.get("time_cond_proj_dim"):
        inputs.append(Input("timestep_cond", (BATCH, constant(width)), dtype, "timestep_cond"))
    return (*inputs, *_added_inputs(config, dtype))


def controlnet_inputs(config: Mapping[str, Any], dtype: str) -> tuple[Input, ...]:
    """Return the inputs of a ControlNet; the conditioning image is in pixels, its scale is left to the caller.

    A union ControlNet takes a flag for each kind of control too, and in a list an image for each kind that is in use: here one.
    """
    scale = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    image = (BATCH, constant(config["conditioning_channels"]), Dim("h", scale), Dim("w", scale))
    kinds = config.get("num_control_type")
    return (
        Input("sample", (BATCH, constant(config["in_channels"]), HEIGHT, WIDTH), dtype, "sample"),
        Input("timestep", (BATCH,), "float32", "timestep"),
        _text_input(config, dtype),
        Input("controlnet_cond", image, dtype, "controlnet_cond"),
        *([Input("control_type", (BATCH, constant(kinds)), dtype, "control_type")] if kinds else ()),
        *_class_label_inputs(config, dtype),
        *_added_inputs(config, dtype),
    )


def adapter_input(config: Mapping[str, Any], dtype: str, vae_factor: int) -> Input:
    """Return the image that a T2I-Adapter takes, in pixels."""
    image = (BATCH, constant(config["in_channels"]), Dim("h", vae_factor), Dim("w", vae_factor))
    return Input("image", image, dtype, "x")


def build_zero_arguments(inputs: tuple[Input, ...], geometry: Geometry, device: torch.device) -> dict[str, Any]:
    """Return keyword arguments for a forward: zeros of the right shape, dtype and device."""
    return build_controlnet_arguments(
        {
            entry.argument: torch.zeros(entry.shape_at(geometry), dtype=getattr(torch, entry.dtype), device=device)
            for entry in inputs
        }
    )


def build_controlnet_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments from values by `Input.argument`; a union ControlNet gets its first kind of control."""
    call = group_arguments(values)
    if "control_type" in call:
        first = torch.zeros_like(call["control_type"])
        first[:, 0] = 1
        call |= {"control_type": first, "control_type_idx": [0], "controlnet_cond": [call["controlnet_cond"]]}
    return call


def _takes_text(config: Mapping[str, Any]) -> bool:
    """Return whether a UNet is called with a text: some are with an image, and some attend to nothing but the latents."""
    widths = config.get("cross_attention_dim")
    has_one_width = isinstance(widths, int) or (widths is not None and len(set(widths)) == 1) or config.get("encoder_hid_dim")
    return bool(has_one_width) and config.get("encoder_hid_dim_type") != "image_proj"


def _count_time_ids(config: Mapping[str, Any]) -> int:
    """Return the number of time ids: the one that leaves a text as wide as pooled texts are beside such a UNet, else 6.

    The projection takes the pooled text and `width` numbers for each id: its input size is their sum. The text is 1280 wide
    in SDXL, or what the UNet attends to: all of it with one text encoder, as in the refiner and in Kolors, half with two.
    """
    total, width = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    attended, pooled = config.get("encoder_hid_dim") or config.get("cross_attention_dim"), set[float]((_SDXL_POOLED,))
    if isinstance(attended, int):
        pooled |= {attended, attended / 2}
    return next((count for count in _TIME_IDS if total - count * width in pooled), _TIME_IDS[0])


def _text_input(config: Mapping[str, Any], dtype: str) -> Input:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    return Input("encoder_hidden_states", (BATCH, TOKENS, constant(width)), dtype, "encoder_hidden_states")


def _class_label_inputs(config: Mapping[str, Any], dtype: str) -> list[Input]:
    kind, width, label_dtype = config.get("class_embed_type"), None, dtype
    if kind is None:
        if config.get("num_class_embeds") is None:
            return []
        label_dtype = "int64"  # the number of a class
    elif kind in ("projection", "simple_projection"):
        width = config["projection_class_embeddings_input_dim"]
    elif kind != "timestep":
        growth = 2 if config.get("time_embedding_type") == "fourier" else 4
        width = config.get("time_embedding_dim") or growth * config["block_out_channels"][0]
    shape = (BATCH,) if width is None else (BATCH, constant(width))
    return [Input("class_labels", shape, label_dtype, "class_labels")]


def _added_inputs(config: Mapping[str, Any], dtype: str) -> list[Input]:
    """Return the entries of added_cond_kwargs."""
    addition, hidden = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    shapes: dict[str, tuple[Dim, ...]] = {}
    if addition not in (None, *_ADDITIONS):
        raise ShapecheckError(f"addition_embed_type {addition!r} is not known; known: {', '.join(_ADDITIONS)}")
    if addition == "text_time":
        total, width, ids = (
            config["projection_class_embeddings_input_dim"],
            config["addition_time_embed_dim"],
            _count_time_ids(config),
        )
        if total <= ids * width:
            raise ShapecheckError(
                f"projection_class_embeddings_input_dim {total} leaves no room for text_embeds beside {ids} time ids of {width}"
            )
        shapes = {"text_embeds": (constant(total - ids * width),), "time_ids": (constant(ids),)}
    elif addition == "text_image":
        shapes = dict.fromkeys(("text_embeds", "image_embeds"), (constant(config["cross_attention_dim"]),))
    elif addition in ("image", "image_hint"):
        shapes = {"image_embeds": (constant(config["encoder_hid_dim"]),)}
        if addition == "image_hint":
            shapes["hint"] = (constant(3), Dim("h", 8), Dim("w", 8))

    if hidden == "image_proj":
        shapes.setdefault("image_embeds", (constant(config["encoder_hid_dim"]),))
    elif hidden == "text_image_proj":
        shapes.setdefault("image_embeds", (constant(config["cross_attention_dim"]),))
    elif hidden not in (None, "text_proj"):
        raise ShapecheckError(
            f"encoder_hid_dim_type {hidden!r} is not known here; an IP-Adapter must be unloaded before a model is probed"
        )
    return [Input(name, (BATCH, *shape), dtype, f"added_cond_kwargs.{name}") for name, shape in shapes.items()]
