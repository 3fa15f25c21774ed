"""The likely cause of a disagreement, in words: which family a ControlNet was made for, how its config differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shapecheck import presets
from shapecheck.contract import Contract, Dim, Input, Mismatch
from shapecheck.presets.families import find_families

_SHAPING_KEYS = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "cross_attention_dim",
    "addition_embed_type",
)
Table = Mapping[str, tuple[Dim, ...]]
"""Slot → shape of what is emitted for it."""


def add_causes(
    found: Sequence[Mismatch], contract: Contract, emitted: Table, inputs: Sequence[Input], config: Mapping[str, Any]
) -> tuple[Mismatch, ...]:
    """The same mismatches, each with the likely cause that all of one ControlNet's faults share put first.

    `emitted` is the ControlNet's own table, `inputs` and `config` what it takes and says of itself.
    """
    cause = _made_for(emitted, inputs, config, contract) or _config_differs(config, contract.config)
    return tuple(replace(each, cause="; ".join(filter(None, (cause, each.cause)))) for each in found)


def add_adapter_causes(found: Sequence[Mismatch], contract: Contract, config: Mapping[str, Any]) -> tuple[Mismatch, ...]:
    """The mismatches of a T2I-Adapter's features, each with the family put first that the adapter was made for, if known."""
    deciding = ("adapter_type", "channels", "downscale_factor")
    known = [presets.load(name) for name in presets.names() if presets.load(name).kind == "adapter"]
    made_for = {
        each.family for each in known if all(_plain(each.config[key]) == _plain(config.get(key)) for key in deciding)
    } - {presets.load(name).family for name in find_families(contract)}
    cause = f"this adapter was made for {' or '.join(sorted(made_for))}" if made_for else ""
    return tuple(replace(each, cause="; ".join(filter(None, (cause, each.cause)))) for each in found)


def compare_pipeline_inputs(unet: Sequence[Input], controlnet: Sequence[Input]) -> tuple[Mismatch, ...]:
    """Inputs that a pipeline gives to both, where the two want different ones."""
    wanted = {each.name: each.shape[1:] for each in unet}
    found = []
    for each in controlnet:
        if each.name in ("timestep", "controlnet_cond", "control_type") or wanted.get(each.name) == each.shape[1:]:
            continue
        if each.name == "sample" and each.shape[1].scale < wanted["sample"][0].scale:
            continue  # inpainting and edit UNets take more latent channels than the ControlNets used with them
        takes = "×".join(map(str, each.shape))
        if each.name not in wanted:
            cause = "a pipeline of this UNet does not give it"
            found.append(Mismatch("input", each.name, takes, "no such input", cause=cause))
        else:
            gives = "×".join(map(str, next(other.shape for other in unet if other.name == each.name)))
            found.append(Mismatch("input", each.name, takes, gives, cause="pipelines give both models the same tensor"))
    return tuple(found)


def _made_for(emitted: Table, inputs: Sequence[Input], config: Mapping[str, Any], contract: Contract) -> str:
    """The family whose slots and text width these are, unless it is the UNet's own."""
    text = _text_width(inputs)
    fits = {
        name: _likeness(inputs, config, known)
        for name, known in presets.contracts().items()
        if known.header.controlnets  # diffusers can build a ControlNet for it
        and _slot_rules(known) == dict(emitted)
        and _text_width(known.inputs) == text
    }
    best = {presets.load(name).family for name, likeness in fits.items() if likeness == max(fits.values())}
    own = {presets.load(name).family for name in find_families(contract)}
    return f"this ControlNet was made for {' or '.join(sorted(best))}" if best and not own & best else ""


def _likeness(inputs: Sequence[Input], config: Mapping[str, Any], unet: Contract) -> tuple[int, int]:
    """How near a ControlNet is to a UNet: inputs of the UNet it does not take, then settings they share."""
    lacking = {each.name for each in unet.inputs} - {each.name for each in inputs}
    shared = sum(key in unet.config and _plain(value) == _plain(unet.config[key]) for key, value in config.items())
    return -len(lacking), shared


def _config_differs(controlnet: Mapping[str, Any], unet: Mapping[str, Any]) -> str:
    differing = [
        f"{key} {_plain(controlnet[key])} (UNet: {_plain(unet[key])})"
        for key in _SHAPING_KEYS
        if key in controlnet and key in unet and _plain(controlnet[key]) != _plain(unet[key])
    ]
    return f"the ControlNet's config has another {', '.join(differing)}" if differing else ""


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _slot_rules(contract: Contract) -> dict[str, tuple[Dim, ...]]:
    return {slot.name: slot.skip for slot in contract.slots}


def _text_width(inputs: Sequence[Input]) -> Dim | None:
    return next((each.shape[-1] for each in inputs if each.name == "encoder_hidden_states"), None)
