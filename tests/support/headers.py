"""Checkpoints that are headers alone: real models' tensors under the names of either layout, the data a hole in the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from shapecheck import presets

Shapes = Mapping[str, tuple[int, ...]]

# Written from CompVis/latent-diffusion ldm/modules/diffusionmodules/openaimodel.py and lllyasviel/ControlNet cldm/cldm.py:
# in a resnet, what diffusers calls norm1, conv1, …
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}


def module(preset: str, **changes) -> torch.nn.Module:
    """A preset's model on the meta device."""
    model = UNet2DConditionModel if presets.load(preset).kind == "unet" else ControlNetModel
    with torch.device("meta"):
        return model.from_config({**presets.load(preset).config, **changes})


def shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def ldm(model: torch.nn.Module) -> Shapes:
    """The same tensors under the names of the original layout, for a model with as many layers in every level."""
    return {ldm_name(name, model.config["layers_per_block"]): shape for name, shape in shapes(model).items()}


def ldm_name(name: str, layers: int) -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{leaf}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", stem):
        return f"zero_convs.{match[1]}.0.{leaf}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", stem):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{leaf}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", stem):
        kind, number, rest = match.groups()
        return f"middle_block.{2 * int(number) + (kind == 'attentions')}.{inner(rest)}.{leaf}"
    way, level, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", stem).groups()
    at = int(level) * (layers + 1) + int(number)
    if way == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{leaf}"
        return f"input_blocks.{at + 1}.{int(kind == 'attentions')}.{inner(rest)}.{leaf}"
    if kind == "upsamplers":
        return f"output_blocks.{int(level) * (layers + 1) + layers}.UP.conv.{leaf}"
    return f"output_blocks.{at}.{int(kind == 'attentions')}.{inner(rest)}.{leaf}"


def inner(rest: str) -> str:
    return RESNET.get(rest, rest)


def upsampled(table: Shapes) -> Shapes:
    """With the number of each upsampler, which follows the attention where its block has one."""
    held = {name.rsplit(".", 1)[0].split(".transformer")[0] for name in table}

    def numbered(name: str) -> str:
        block = name.split(".UP")[0]
        return name.replace("UP", "2" if f"{block}.1.proj_in" in held else "1")

    return {numbered(name): shape for name, shape in table.items()}


def original(model: torch.nn.Module, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in upsampled(ldm(model)).items()}


def write(path: Path, table: Shapes, metadata: Mapping[str, str] | None = None) -> Path:
    """A .safetensors file of float16 tensors, whose data takes no room on the disk."""
    record: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, shape in table.items():
        size = 2 * math.prod(shape)
        record[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(record).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path
