"""A configuration read off the shapes in a checkpoint's header: one .safetensors file, in the original layout or diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapecheck import presets
from shapecheck.contract import Role, ShapecheckError, show
from shapecheck.contract.dims import Shape
from shapecheck.contract.errors import one_line
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


_FIRST = ("input_blocks.0.0.weight", "conv_in.weight")


_HEAD = 64
"""Channels of one attention head in the families with linear projections: SD2, SDXL. SD1 has eight heads everywhere."""


_HEADS = 8


_TIME_WIDTH = 256
"""What SDXL's time ids are widened to, each."""


_POOLED_TEXT = (1280, 2048)
"""Text widths of the models that take pooled text and time ids beside the text: the SDXL refiner, SDXL."""


_LONGEST_NAME = 200


_SHOWN = 6


_GIVE = "give the diffusers folder or its config.json"


_OPEN = {"sample_size", "attention_head_dim", "only_cross_attention"}
"""Settings that shapes do not tell, or not whole."""


_NOT_BESIDE = dict.fromkeys(
    (
        "addition_embed_type",
        "addition_time_embed_dim",
        "class_embed_type",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
    )
)
"""What a configuration says where a model takes nothing besides latents, time and text."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor as a file has it."""

    name: str
    """The file's own name for it."""
    shape: Shape


@dataclass(frozen=True, slots=True)
class Read:
    """What a header tells of a model."""

    config: Mapping[str, Any]
    tensors: Mapping[str, CheckpointTensor]
    """By their names in diffusers."""
    vae_factor: int
    """Pixels a latent cell covers, by the VAE in the file, else as in the preset with these tensors, else 8."""
    notes: tuple[str, ...]


def read_checkpoint(path: Path, role: Role) -> Read | None:
    """The UNet or the ControlNet in a .safetensors file; None where it holds the other one only.

    Only the header is read. Raises ShapecheckError where that is no valid one, tells of neither, or of a kind of model that
    cannot be told from shapes.
    """
    shapes = {name: stored.shape for name, stored in read_table([path]).items()}
    own = _part(shapes, role)
    if own is None:
        if _part(shapes, "controlnet" if role == "unet" else "unet") is not None:
            return None
        raise ShapecheckError(_neither(path, shapes))
    names = {name: name for name in own}  # in diffusers, and in the file less the prefix
    if is_ldm(own):
        widths = {shape[-1] for name, (_, shape) in own.items() if name.endswith("attn2.to_k.weight") and shape}
        names = rename_tensors(own, labels="add_embedding" if widths & set(_POOLED_TEXT) else "class_embedding")
    table = {new: CheckpointTensor(*own[old]) for new, old in names.items()}
    tensors = Tensors(str(path), table, _numbers(table))
    config = _shared(tensors)
    config |= _of_unet(tensors, config["transformer_layers_per_block"]) if role == "unet" else _of_controlnet(tensors)
    factor = _vae_factor(shapes)
    known = families.find_sharing(config, config.keys() - _OPEN - {"_class_name"}) if role == "unet" else ()
    if known:  # presets that have the same tensors have the same in these too: a test says so
        like = presets.contract(known[0])
        config |= {key: value for key, value in like.config.to_json().items() if key in _OPEN - {"sample_size"}}
        factor = factor or like.header.vae_factor
    return Read(config, table, factor or 8, tuple(_unknown(path, config, known, assumed=factor is None)))


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one model, by their names in diffusers."""

    origin: str
    table: Mapping[str, CheckpointTensor]
    numbers: Mapping[str, frozenset[str]]
    """Of every module with numbered parts: their numbers."""

    def shape(self, name: str, rank: int) -> Shape:
        """Raises ShapecheckError where there is none of that name and number of axes."""
        held = self.table.get(name)
        if held is None:
            raise ShapecheckError(f"{self.origin}: the model in it has no {name}, by which its sizes are told; is it complete?")
        if len(held.shape) != rank:
            raise ShapecheckError(
                f"{self.origin}: {one_line(held.name)} is {show(held.shape)}, expected {rank} axes; is it quantized? "
                f"Otherwise {_GIVE}"
            )
        return held.shape

    def count(self, path: str) -> int:
        """How many numbered parts a module has."""
        return len(self.numbers.get(path, ()))

    def has(self, start: str) -> bool:
        """Whether any name starts so."""
        return any(name.startswith(start) for name in self.table)


@dataclass(frozen=True, slots=True)
class _Block:
    """A down, up or mid block: its resnets, and the transformer layers of each of its attentions."""

    path: str
    resnets: int
    depths: tuple[int, ...]


def _numbers(names: Iterable[str]) -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        if len(name) <= _LONGEST_NAME:
            parts = name.split(".")
            for at, part in enumerate(parts):
                if part.isdecimal():
                    found.setdefault(".".join(parts[:at]), set()).add(part)
    return {path: frozenset(each) for path, each in found.items()}


def _part(shapes: Mapping[str, Shape], role: Role) -> dict[str, tuple[str, Shape]] | None:
    """The tensors of that kind of model, by what follows the prefix: the file's whole name, and the shape."""
    for prefix in _PREFIXES[role]:
        inner = {name.removeprefix(prefix): (name, shape) for name, shape in shapes.items() if name.startswith(prefix)}
        if any(each in inner for each in _FIRST) and any(name.startswith(_MARKS[role]) for name in inner):
            return inner
    return None


def _shared(tensors: Tensors) -> dict[str, Any]:
    """The settings that a UNet and a ControlNet both have."""
    downs, mid = _blocks(tensors, "down"), _block(tensors, "mid_block")
    channels = [tensors.shape(f"{each.path}.resnets.0.conv1.weight", 4)[0] for each in downs]
    layers = [each.resnets for each in downs]
    first = tensors.shape("conv_in.weight", 4)
    linear = _linear(tensors, [*downs, mid])
    plain_mid = "UNetMidBlock2D" if tensors.has("mid_block.") else None
    return {
        "in_channels": first[1],
        "block_out_channels": channels,
        "down_block_types": [_kind(each, "Down") for each in downs],
        "layers_per_block": _one(layers),
        "transformer_layers_per_block": _depths(downs, mid),
        "cross_attention_dim": _text_width(tensors),
        "use_linear_projection": linear,
        "attention_head_dim": [max(each // _HEAD, 1) for each in channels] if linear else _HEADS,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid.depths else plain_mid,
        **_NOT_BESIDE,
        **_embeddings(tensors),
    }


def _of_unet(tensors: Tensors, depths: Any) -> dict[str, Any]:
    downs, ups = _blocks(tensors, "down"), _blocks(tensors, "up")
    if len(downs) != len(ups):
        raise ShapecheckError(f"{tensors.origin}: {len(downs)} down blocks and {len(ups)} up blocks; expected as many of each")
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": None,
        "conv_in_kernel": tensors.shape("conv_in.weight", 4)[2],
        "conv_out_kernel": tensors.shape("conv_out.weight", 4)[2],
        "out_channels": tensors.shape("conv_out.weight", 4)[0],
        "up_block_types": [_kind(each, "Up") for each in ups],
        "only_cross_attention": _only_cross(tensors, downs),
    }
    guided = tensors.has("time_embedding.cond_proj.")
    config["time_cond_proj_dim"] = tensors.shape("time_embedding.cond_proj.weight", 2)[1] if guided else None
    upward = [_one(each.depths) for each in ups]
    downward = depths if isinstance(depths, list) else [depths] * len(downs)
    mirrored = all(up in (None, down) for up, down in zip(upward, reversed(downward), strict=True))
    spelt = not mirrored or any(isinstance(each, list) for each in downward)
    config["reverse_transformer_layers_per_block"] = [1 if each is None else each for each in upward] if spelt else None
    return config


def _of_controlnet(tensors: Tensors) -> dict[str, Any]:
    start = "controlnet_cond_embedding"
    first = tensors.shape(f"{start}.conv_in.weight", 4)
    count = tensors.count(f"{start}.blocks")
    wider = [tensors.shape(f"{start}.blocks.{number}.weight", 4)[0] for number in range(1, count, 2)]
    return {
        "_class_name": "ControlNetModel",
        "conditioning_channels": first[1],
        "conditioning_embedding_out_channels": [first[0], *wider],
    }


def _blocks(tensors: Tensors, way: str) -> list[_Block]:
    return [_block(tensors, f"{way}_blocks.{level}") for level in range(tensors.count(f"{way}_blocks"))]


def _block(tensors: Tensors, path: str) -> _Block:
    attentions = [f"{path}.attentions.{number}" for number in range(tensors.count(f"{path}.attentions"))]
    depths = tuple(tensors.count(f"{each}.transformer_blocks") for each in attentions)
    return _Block(path, tensors.count(f"{path}.resnets"), depths)


def _kind(block: _Block, way: str) -> str:
    return f"CrossAttn{way}Block2D" if block.depths else f"{way}Block2D"


def _depths(downs: Sequence[_Block], mid: _Block) -> Any:
    """Transformer layers level by level; where a level has no attention, what diffusers' own configurations have there."""
    told = [_one(each.depths) for each in downs]
    deepest = mid.depths[0] if mid.depths else None
    known = [each for each in (*told, deepest) if each is not None]
    filler = known[0] if known and all(each == known[0] for each in known) else 1
    if told and told[-1] is None and deepest is not None:
        told[-1] = deepest  # the mid block takes that of the last level
    filled = [filler if each is None else each for each in told]
    return filled if any(isinstance(each, list) for each in filled) else _one(filled)


def _linear(tensors: Tensors, blocks: Iterable[_Block]) -> bool:
    """Whether the transformers' projections are linear layers rather than convolutions of 1×1."""
    paths = [f"{each.path}.attentions.0.proj_in.weight" for each in blocks if each.depths]
    ranks = {len(tensors.table[path].shape) if path in tensors.table else 0 for path in paths}
    if ranks <= {2, 4} and len(ranks) == 1:
        return ranks == {2}
    raise ShapecheckError(
        f"{tensors.origin}: its attentions are no transformers of one kind, with proj_in a linear layer or a convolution; "
        f"such models are read from a config.json only: {_GIVE}"
    )


def _text_width(tensors: Tensors) -> int:
    names = [name for name in tensors.table if name.endswith(".attn2.to_k.weight")]
    widths = {tensors.shape(name, 2)[1] for name in names}
    if len(widths) == 1:
        return widths.pop()
    found = " and ".join(map(str, sorted(widths)[:_SHOWN])) or "no attention to text at all"
    raise ShapecheckError(f"{tensors.origin}: the text width is told by attention to text of one width; found {found}; {_GIVE}")


def _only_cross(tensors: Tensors, downs: Sequence[_Block]) -> Any:
    """Level by level, whether even the first attention of a transformer is to the text: its keys are as wide as that."""
    told = []
    for each in downs:
        name = f"{each.path}.attentions.0.transformer_blocks.0.attn1.to_k.weight"
        told.append(name in tensors.table and len(set(tensors.shape(name, 2))) > 1)
    return told if any(told) else False


def _embeddings(tensors: Tensors) -> dict[str, Any]:
    """What the model takes besides latents, time and text."""
    if tensors.has("add_embedding.linear_1."):
        width = tensors.shape("add_embedding.linear_1.weight", 2)[1]
        kind = {"addition_embed_type": "text_time", "addition_time_embed_dim": _TIME_WIDTH}
        return {**kind, "projection_class_embeddings_input_dim": width}
    if tensors.has("class_embedding.linear_1."):
        width = tensors.shape("class_embedding.linear_1.weight", 2)[1]
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    if tensors.has("class_embedding.weight"):
        return {"num_class_embeds": tensors.shape("class_embedding.weight", 2)[0]}
    return {}


def _vae_factor(shapes: Mapping[str, Shape]) -> int | None:
    """Two to the number of halvings in the encoder of the VAE, where the file has one."""
    halving = re.compile(r"first_stage_model\.encoder\.down\.(\d)\.downsample\.conv\.weight")
    count = sum(1 for name in shapes if halving.fullmatch(name))
    return 2**count if count else None


def _unknown(path: Path, config: Mapping[str, Any], known: Sequence[str], *, assumed: bool) -> Iterator[str]:
    """What the reader must know of a configuration that nobody wrote down."""
    heads = f"{_HEAD} channels each" if config["use_linear_projection"] else f"{_HEADS} in each level"
    of = f"as in the presets with the same tensors ({', '.join(known)})" if known else f"as in Stable Diffusion, {heads}"
    yield (
        f"{path.name}: settings told by the shapes in its header, and they build exactly its tensors. Attention heads are not "
        f"in a header: {of}; norm groups and all else that changes no shape as diffusers has it by default"
    )
    if "sample_size" in config:
        yield f"native size unknown; shown at 64×64 where no size is asked for{'; 8 pixels a latent cell assumed' * assumed}"


def _neither(path: Path, shapes: Mapping[str, Shape]) -> str:
    """That a file holds no model of either kind, and what it holds."""
    starts = list(dict.fromkeys(".".join(name.split(".", 3)[:3]) for name in shapes))
    held = f"its {len(shapes)} tensors begin with {one_line(', '.join(starts[:_SHOWN]))}" if shapes else "it is empty"
    lora = any("lora" in name for name in shapes)
    kind = "; it looks like a LoRA, which is no model of its own: give the model it is for" if lora else ""
    return (
        f"{path} holds no Stable Diffusion UNet or ControlNet, neither in the original layout nor in diffusers': {held}{kind}"
    )


def _one(values: Sequence[Any]) -> Any:
    """The one value that all have, else the list of all; None of none."""
    if not values:
        return None
    return values[0] if all(each == values[0] for each in values) else list(values)
