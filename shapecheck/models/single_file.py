"""A configuration read off the shapes in a checkpoint's header: one .safetensors file, in the original layout or diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapecheck import presets
from shapecheck.contract import Role, Shape, ShapecheckError, show
from shapecheck.contract.errors import one_line
from shapecheck.models.config_file import CheckpointTensor, ModelSource
from shapecheck.models.ldm_names import is_ldm, rename_tensors
from shapecheck.models.safetensors import read_table
from shapecheck.presets import families

_PREFIXES: Mapping[Role, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    "controlnet": ("control_model.", "controlnet.", ""),
}
_MARKS: Mapping[Role, tuple[str, ...]] = {
    "unet": ("up_blocks.", "output_blocks."),
    "controlnet": ("controlnet_down_blocks.", "zero_convs."),
}
_HEAD_WIDTH = 64
"""Channels of one attention head in the families with linear projections: SD2, SDXL. SD1 has eight heads everywhere."""
_HEADS = 8
_MOST_SHOWN = 6
_ADVICE = "give the diffusers folder or its config.json"
_UNTOLD = {"attention_head_dim", "only_cross_attention"}
"""Settings that shapes do not show, or only in part."""
_NO_EMBEDDINGS = dict.fromkeys(
    ("addition_embed_type", "addition_time_embed_dim", "class_embed_type", "num_class_embeds",
     "projection_class_embeddings_input_dim")
)  # fmt: skip
"""The settings of a model that takes nothing besides latents, time and text."""


def read_checkpoint(path: Path, role: Role, name: str) -> ModelSource | None:
    """Return the UNet or the ControlNet in a .safetensors file, or None if it holds only the other one.

    Only the header is read. Raises ShapecheckError if the header is damaged or describes neither, or if shapes do not
    determine this kind of model.
    """
    shapes = {name: stored.shape for name, stored in read_table([path]).items()}
    own = _select_part(shapes, role)
    if own is None:
        if _select_part(shapes, "controlnet" if role == "unet" else "unet") is not None:
            return None
        starts = list(dict.fromkeys(".".join(name.split(".", 3)[:3]) for name in shapes))[:_MOST_SHOWN]
        content = f"its {len(shapes)} tensors begin with {one_line(', '.join(starts))}" if shapes else "it is empty"
        if any("lora" in name for name in shapes):
            content += "; it looks like a LoRA, which is not a model by itself: give the model it is for"
        raise ShapecheckError(
            f"{path} holds no Stable Diffusion UNet or ControlNet, neither in the original layout nor in diffusers': {content}"
        )

    names = {name: name for name in own}  # in diffusers, and in the file less the prefix
    if is_ldm(own):
        widths = {shape[-1] for name, (_, shape) in own.items() if name.endswith("attn2.to_k.weight") and shape}
        # The SDXL refiner and SDXL, with text of these widths, take pooled text and time ids beside it.
        names = rename_tensors(own, labels="add_embedding" if widths & {1280, 2048} else "class_embedding")
    tensors = CheckpointTensors(str(path), {new: CheckpointTensor(*own[old]) for new, old in names.items()})
    config = _read_shared(tensors)
    config |= _read_unet(tensors, config) if role == "unet" else _read_controlnet(tensors)

    halving = re.compile(r"first_stage_model\.encoder\.down\.(\d)\.downsample\.conv\.weight")
    halvings = sum(1 for name in shapes if halving.fullmatch(name))  # in the encoder of the VAE, if the file has one
    factor = 2**halvings if halvings else None  # else as in the preset with these tensors, else 8
    shown = config.keys() - _UNTOLD - {"_class_name", "sample_size"}
    known = families.find_sharing(config, shown) if role == "unet" else ()
    if known:  # presets that have the same tensors have the same in these too: a test says so
        heads = f"in the presets with the same tensors ({', '.join(known)})"
        preset = presets.contract(known[0])
        config |= {key: value for key, value in preset.config.to_json().items() if key in _UNTOLD}
        factor = factor or preset.header.vae_factor
    elif config["use_linear_projection"]:
        heads = f"in Stable Diffusion, {_HEAD_WIDTH} channels each"
    else:
        heads = f"in Stable Diffusion, {_HEADS} in each level"
    note = (
        f"{path.name}: settings read from the shapes in its header, and they build exactly its tensors. Attention heads are "
        f"not in a header: as {heads}; norm groups and all else that changes no shape as diffusers has it by default"
    )
    assumed = "; 8 pixels per latent cell assumed" if factor is None else ""
    size = (f"native size unknown; shown at 64×64 unless a size is requested{assumed}",) if role == "unet" else ()
    class_name = config["_class_name"]
    return ModelSource(name, str(path), class_name, config, None, factor or 8, (note, *size), tensors=tensors.table)


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """The tensors of one model, by their names in diffusers."""

    origin: str
    table: Mapping[str, CheckpointTensor]
    parts: dict[str, set[str]] = field(init=False, default_factory=dict)
    """The numbers of the parts of every module with numbered parts."""

    def __post_init__(self) -> None:
        for name in self.table:
            if len(name) <= 200:  # each of the numbers in a name adds a path as long as the name
                words = name.split(".")
                for at, word in enumerate(words):
                    if word.isdecimal():
                        self.parts.setdefault(".".join(words[:at]), set()).add(word)

    def shape(self, name: str, rank: int) -> Shape:
        """Return the shape of a tensor. Raises ShapecheckError if there is none of that name and number of axes."""
        tensor = self.table.get(name)
        if tensor is None:
            raise ShapecheckError(f"{self.origin}: the model in it has no {name}, which gives its sizes; is it complete?")
        if len(tensor.shape) != rank:
            raise ShapecheckError(
                f"{self.origin}: {one_line(tensor.name)} is {show(tensor.shape)}, expected {rank} axes; is it quantized? "
                f"Otherwise {_ADVICE}"
            )
        return tensor.shape

    def count(self, path: str) -> int:
        """Return the number of numbered parts of a module."""
        return len(self.parts.get(path, ()))

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.table)

    def block(self, path: str) -> _Block:
        attentions = range(self.count(f"{path}.attentions"))
        depths = tuple(self.count(f"{path}.attentions.{number}.transformer_blocks") for number in attentions)
        return _Block(path, self.count(f"{path}.resnets"), depths)

    def blocks(self, direction: str) -> list[_Block]:
        """Return the blocks of one direction, down or up, level by level."""
        return [self.block(f"{direction}_blocks.{level}") for level in range(self.count(f"{direction}_blocks"))]


@dataclass(frozen=True, slots=True)
class _Block:
    """A down, up or mid block: its resnets, and the transformer layers of each of its attentions."""

    path: str
    resnets: int
    depths: tuple[int, ...]


def _select_part(shapes: Mapping[str, Shape], role: Role) -> dict[str, tuple[str, Shape]] | None:
    """Return the tensors of that kind of model, by their names less the prefix: the file's whole name, and the shape."""
    for prefix in _PREFIXES[role]:
        inner = {name.removeprefix(prefix): (name, shape) for name, shape in shapes.items() if name.startswith(prefix)}
        starts = inner.keys() & {"input_blocks.0.0.weight", "conv_in.weight"}
        if starts and any(name.startswith(_MARKS[role]) for name in inner):
            return inner
    return None


def _read_shared(tensors: CheckpointTensors) -> dict[str, Any]:
    """Return the settings that a UNet and a ControlNet both have."""
    downs, mid = tensors.blocks("down"), tensors.block("mid_block")
    channels = [tensors.shape(f"{block.path}.resnets.0.conv1.weight", 4)[0] for block in downs]
    in_channels = tensors.shape("conv_in.weight", 4)[1]
    projections = [f"{block.path}.attentions.0.proj_in.weight" for block in (*downs, mid) if block.depths]
    ranks = {len(tensors.table[path].shape) if path in tensors.table else 0 for path in projections}
    if len(ranks) != 1 or not ranks <= {2, 4}:  # a linear layer, or a convolution of 1×1
        raise ShapecheckError(
            f"{tensors.origin}: its attentions are not transformers of one kind, with proj_in a linear layer or a convolution; "
            f"such models are read from a config.json only: {_ADVICE}"
        )
    linear = ranks == {2}
    keys = [name for name in tensors.table if name.endswith(".attn2.to_k.weight")]
    widths = {tensors.shape(name, 2)[1] for name in keys}
    if len(widths) != 1:
        actual = " and ".join(map(str, sorted(widths)[:_MOST_SHOWN])) or "no attention to text at all"
        raise ShapecheckError(
            f"{tensors.origin}: the text width is read from attention to text of one width; found {actual}; {_ADVICE}"
        )
    embeddings: dict[str, Any] = {}  # of what the model takes besides latents, time and text
    if tensors.has("add_embedding.linear_1."):
        embeddings = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        embeddings["projection_class_embeddings_input_dim"] = tensors.shape("add_embedding.linear_1.weight", 2)[1]
    elif tensors.has("class_embedding.linear_1."):
        embeddings = {"class_embed_type": "projection"}
        embeddings["projection_class_embeddings_input_dim"] = tensors.shape("class_embedding.linear_1.weight", 2)[1]
    elif tensors.has("class_embedding.weight"):
        embeddings = {"num_class_embeds": tensors.shape("class_embedding.weight", 2)[0]}
    plain_mid = "UNetMidBlock2D" if tensors.has("mid_block.") else None
    return {
        "in_channels": in_channels,
        "block_out_channels": channels,
        "down_block_types": [_name_block_type(block, "Down") for block in downs],
        "layers_per_block": _collapse([block.resnets for block in downs]),
        "transformer_layers_per_block": _read_depths(downs, mid),
        "cross_attention_dim": widths.pop(),
        "use_linear_projection": linear,
        "attention_head_dim": [max(width // _HEAD_WIDTH, 1) for width in channels] if linear else _HEADS,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid.depths else plain_mid,
        **_NO_EMBEDDINGS,
        **embeddings,
    }


def _read_unet(tensors: CheckpointTensors, shared: Mapping[str, Any]) -> dict[str, Any]:
    downs, ups = tensors.blocks("down"), tensors.blocks("up")
    if len(downs) != len(ups):
        raise ShapecheckError(f"{tensors.origin}: {len(downs)} down blocks and {len(ups)} up blocks; expected as many of each")
    out_channels, _, out_kernel, _ = tensors.shape("conv_out.weight", 4)
    only_cross = []
    for block in downs:  # if even the first attention of a transformer is to the text, its keys are as wide as the text
        key = f"{block.path}.attentions.0.transformer_blocks.0.attn1.to_k.weight"
        only_cross.append(key in tensors.table and len(set(tensors.shape(key, 2))) > 1)
    guided = tensors.has("time_embedding.cond_proj.")
    guidance = tensors.shape("time_embedding.cond_proj.weight", 2)[1] if guided else None

    # layers upward are the mirror image by default, and spelt out if they are not, or if one level has several numbers
    depths = shared["transformer_layers_per_block"]
    downward = depths if isinstance(depths, list) else [depths] * len(downs)
    upward = [_collapse(block.depths) for block in ups]
    mirrored = all(up in (None, down) for up, down in zip(upward, reversed(downward), strict=True))
    spelt = not mirrored or any(isinstance(depth, list) for depth in downward)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": None,
        "conv_in_kernel": tensors.shape("conv_in.weight", 4)[2],
        "conv_out_kernel": out_kernel,
        "out_channels": out_channels,
        "up_block_types": [_name_block_type(block, "Up") for block in ups],
        "only_cross_attention": only_cross if any(only_cross) else False,
        "time_cond_proj_dim": guidance,
        "reverse_transformer_layers_per_block": [1 if depth is None else depth for depth in upward] if spelt else None,
    }


def _read_controlnet(tensors: CheckpointTensors) -> dict[str, Any]:
    path = "controlnet_cond_embedding"
    first, conditioning, *_ = tensors.shape(f"{path}.conv_in.weight", 4)
    count = tensors.count(f"{path}.blocks")
    wider = [tensors.shape(f"{path}.blocks.{number}.weight", 4)[0] for number in range(1, count, 2)]
    return {
        "_class_name": "ControlNetModel",
        "conditioning_channels": conditioning,
        "conditioning_embedding_out_channels": [first, *wider],
    }


def _name_block_type(block: _Block, direction: str) -> str:
    return f"CrossAttn{direction}Block2D" if block.depths else f"{direction}Block2D"


def _read_depths(downs: Sequence[_Block], mid: _Block) -> Any:
    """Return the transformer layers level by level; for a level without attention, as diffusers' own configurations do."""
    depths = [_collapse(block.depths) for block in downs]
    deepest = mid.depths[0] if mid.depths else None
    known = [depth for depth in (*depths, deepest) if depth is not None]
    filler = known[0] if known and all(depth == known[0] for depth in known) else 1
    if depths and depths[-1] is None and deepest is not None:
        depths[-1] = deepest  # the mid block has as many as the last level
    filled = [filler if depth is None else depth for depth in depths]
    return filled if any(isinstance(depth, list) for depth in filled) else _collapse(filled)


def _collapse(values: Sequence[Any]) -> Any:
    """Return the one value that all have, else the list of all, and None of none."""
    if not values:
        return None
    return values[0] if all(value == values[0] for value in values) else list(values)
