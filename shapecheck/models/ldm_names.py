"""The names of tensors in the original (LDM, CompVis, SGM) layout as diffusers has them; by names alone, no shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby

_PLAIN = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj", "input_blocks.0.0": "conv_in",
    "middle_block_out.0": "controlnet_mid_block", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
_LABELS = {"label_emb.0.0": "linear_1", "label_emb.0.2": "linear_2"}
_BLOCK = re.compile(r"(?P<side>input_blocks|output_blocks|middle_block)\.(?P<path>\d{1,4}(?:\.\d{1,4})?)\.(?P<rest>[a-z].*)")
_ZERO = re.compile(r"zero_convs\.(\d{1,4})\.0")
_HINT = re.compile(r"input_hint_block\.(\d{1,4})")


def is_ldm(names: Iterable[str]) -> bool:
    """Return whether the names of a UNet's or ControlNet's tensors are of this layout."""
    return "input_blocks.0.0.weight" in names


def rename_tensors(names: Iterable[str], *, labels: str) -> dict[str, str]:
    """Return name in diffusers → name in the file; a name that is of neither layout stays itself.

    `labels` is diffusers' name of the embedding of what is given besides the text: add_embedding or class_embedding.
    """
    names = list(names)
    blocks = _name_blocks(names)
    hints = sorted({int(match[1]) for match in map(_HINT.match, names) if match})
    renamed: dict[str, str] = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        new = f"{_PLAIN.get(stem, stem)}.{leaf}" if stem else leaf
        if match := _BLOCK.fullmatch(name):
            if block := blocks.get((match["side"], match["path"])):
                rest = match["rest"]
                layer = next((layer for layer in _RESNET if rest.startswith(f"{layer}.")), "")
                inner = _RESNET[layer] + rest.removeprefix(layer) if layer else rest.removeprefix("op.")
                new = f"{block}.{inner}"
        elif match := _ZERO.fullmatch(stem):
            new = f"controlnet_down_blocks.{int(match[1])}.{leaf}"
        elif match := _HINT.fullmatch(stem):
            # the first and the last of the convolutions of the conditioning image have names of their own
            number = hints.index(int(match[1]))
            layer = "conv_in" if number == 0 else "conv_out" if number == len(hints) - 1 else f"blocks.{number - 1}"
            new = f"controlnet_cond_embedding.{layer}.{leaf}"
        elif stem in _LABELS:
            new = f"{labels}.{_LABELS[stem]}.{leaf}"
        elif stem == "label_emb":
            new = f"class_embedding.{leaf}"
        renamed[name if new in renamed else new] = name
    return renamed


def _name_blocks(names: Iterable[str]) -> Mapping[tuple[str, str], str]:
    """Return (side, numbers in the file) → module in diffusers, of every numbered block."""
    parts: dict[tuple[str, str], set[str]] = {}
    for name in names:
        if match := _BLOCK.fullmatch(name):
            parts.setdefault((match["side"], match["path"]), set()).add(match["rest"].partition(".")[0])
    ordered = sorted(parts, key=lambda key: (key[0], *map(int, key[1].split("."))))
    kinds = {key: _recognize_block(parts[key]) for key in ordered}
    blocks: dict[tuple[str, str], str] = {}
    counts = Counter[str]()
    side, level, layer = "", 0, 0
    for (own_side, _), members in groupby(ordered, key=lambda key: (key[0], key[1].split(".")[0])):
        if own_side != side:
            side, level, layer = own_side, 0, 0
        inside = {key: kinds[key] for key in members if kinds[key]}
        for key, kind in inside.items():
            if side == "middle_block":
                blocks[key] = f"mid_block.{kind}.{counts[kind]}"
                counts[kind] += 1
            else:
                number = {"downsamplers": "0.conv", "upsamplers": "0"}.get(kind, str(layer))
                blocks[key] = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}.{kind}.{number}"
        layer += "resnets" in inside.values()
        if {"downsamplers", "upsamplers"} & set(inside.values()):  # a change of size ends a level
            level, layer = level + 1, 0
    return blocks


def _recognize_block(parts: set[str]) -> str:
    """Return diffusers' name for a kind of block, by the first parts of the names in it; empty for any other."""
    if "in_layers" in parts:
        return "resnets"
    if parts in ({"op"}, {"conv"}):
        return "downsamplers" if parts == {"op"} else "upsamplers"
    return "attentions" if "proj_in" in parts else ""
