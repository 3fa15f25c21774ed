"""The names of tensors in the original (LDM, CompVis, SGM) layout as diffusers has them; by names alone, no shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

_PLAIN = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "input_blocks.0.0": "conv_in",
    "middle_block_out.0": "controlnet_mid_block",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


_LABELS = {"label_emb.0.0": "linear_1", "label_emb.0.2": "linear_2", "label_emb": ""}


_BLOCK = re.compile(r"(?P<side>input_blocks|output_blocks|middle_block)\.(?P<path>\d{1,4}(?:\.\d{1,4})?)\.(?P<rest>[a-z].*)")


_ZERO = re.compile(r"zero_convs\.(\d{1,4})\.0")


_HINT = re.compile(r"input_hint_block\.(\d{1,4})")


def is_ldm(names: Iterable[str]) -> bool:
    """Whether the names of a UNet's or ControlNet's tensors are of this layout."""
    return "input_blocks.0.0.weight" in names


def rename_tensors(names: Iterable[str], *, labels: str) -> dict[str, str]:
    """Return name in diffusers → name in the file; a name that is of neither layout stays itself.

    `labels` is what diffusers calls the embedding of what is given besides the text: add_embedding or class_embedding.
    """
    names = list(names)
    blocks = _blocks(names)
    hints = sorted({int(match[1]) for match in map(_HINT.match, names) if match})
    found: dict[str, str] = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        if match := _BLOCK.fullmatch(name):
            place = blocks.get((match["side"], match["path"]))
            new = f"{place}.{_inner(match['rest'])}" if place else _plain(stem, leaf)
        elif match := _ZERO.fullmatch(stem):
            new = f"controlnet_down_blocks.{int(match[1])}.{leaf}"
        elif match := _HINT.fullmatch(stem):
            # the first and the last of the convolutions of the conditioning image have names of their own
            number = hints.index(int(match[1]))
            own = "conv_in" if number == 0 else "conv_out" if number == len(hints) - 1 else f"blocks.{number - 1}"
            new = f"controlnet_cond_embedding.{own}.{leaf}"
        elif stem in _LABELS:
            new = ".".join(filter(None, (labels if _LABELS[stem] else "class_embedding", _LABELS[stem], leaf)))
        else:
            new = _plain(stem, leaf)
        found[name if new in found else new] = name
    return found


def _plain(stem: str, leaf: str) -> str:
    return f"{_PLAIN.get(stem, stem)}.{leaf}" if stem else leaf


def _inner(rest: str) -> str:
    """What follows the block's number: a resnet's layers are called otherwise, all else is the same."""
    for old, new in _RESNET.items():
        if rest.startswith(f"{old}."):
            return new + rest.removeprefix(old)
    return rest.removeprefix("op.")


def _blocks(names: Iterable[str]) -> Mapping[tuple[str, str], str]:
    """(side, numbers in the file) → module in diffusers, of every numbered block."""
    rests: dict[tuple[str, str], set[str]] = {}
    for name in names:
        if match := _BLOCK.fullmatch(name):
            rests.setdefault((match["side"], match["path"]), set()).add(match["rest"].partition(".")[0])
    ordered = sorted(rests, key=lambda key: (key[0], *map(int, key[1].split("."))))
    found: dict[tuple[str, str], str] = {}
    for side, keys in groupby(ordered, key=lambda key: key[0]):
        paths = [path for _, path in keys]
        kinds = {path: _kind(rests[side, path]) for path in paths}
        placed = _middle(kinds) if side == "middle_block" else _levels(kinds, "down" if side == "input_blocks" else "up")
        found |= {(side, path): place for path, place in placed}
    return found


def _kind(parts: set[str]) -> str:
    """What a block is, by the first parts of what it holds."""
    if "in_layers" in parts:
        return "resnets"
    if parts == {"op"}:
        return "downsamplers"
    if parts == {"conv"}:
        return "upsamplers"
    return "attentions" if "proj_in" in parts else ""


def _middle(kinds: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    counts = dict.fromkeys(kinds.values(), 0)
    for path, kind in kinds.items():
        if kind:
            yield path, f"mid_block.{kind}.{counts[kind]}"
            counts[kind] += 1


def _levels(kinds: Mapping[str, str], way: str) -> Iterator[tuple[str, str]]:
    """The blocks of one way, level by level: what changes the size ends a level."""
    level = layer = 0
    for _, members in groupby(kinds, key=lambda path: path.split(".")[0]):
        inside = list(members)
        for path in inside:
            if kind := kinds[path]:
                number = {"downsamplers": "0.conv", "upsamplers": "0"}.get(kind, layer)
                yield path, f"{way}_blocks.{level}.{kind}.{number}"
        held = {kinds[path] for path in inside}
        layer += "resnets" in held
        if held & {"downsamplers", "upsamplers"}:
            level, layer = level + 1, 0
