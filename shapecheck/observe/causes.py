"""The likely cause of a disagreement, in words: which family a ControlNet was made for, how its config differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from shapecheck import presets
from shapecheck.contract import Config, Contract, Dim, Input, Mismatch
from shapecheck.presets.families import find_families

_SHAPING_KEYS = (
    "down_block_types", "block_out_channels", "layers_per_block", "downsample_padding", "cross_attention_dim",
    "addition_embed_type",
)  # fmt: skip


def add_causes(
    mismatches: Sequence[Mismatch],
    contract: Contract,
    emitted: Mapping[str, tuple[Dim, ...]],
    inputs: Sequence[Input],
    config: Config,
) -> tuple[Mismatch, ...]:
    """Put the likely cause that all faults of one ControlNet share before the cause of each.

    `emitted` maps slots to the rules of what the ControlNet emits; `inputs` and `config` are its own.
    """
    return _put_first(_find_family(emitted, inputs, config, contract) or _compare_configs(config, contract.config), mismatches)


def add_adapter_causes(mismatches: Sequence[Mismatch], contract: Contract, config: Config) -> tuple[Mismatch, ...]:
    """Put the family that a T2I-Adapter was made for, if known, before the cause of every mismatch of its features."""
    keys = ("adapter_type", "channels", "downscale_factor")
    adapters = [preset for preset in map(presets.load, presets.names()) if preset.kind == "adapter"]
    families = {preset.family for preset in adapters if all(Config(preset.config)[key] == config.get(key) for key in keys)}
    others = families - _list_families(find_families(contract))
    return _put_first(f"this adapter was made for {' or '.join(sorted(others))}" if others else "", mismatches)


def compare_pipeline_inputs(unet: Sequence[Input], controlnet: Sequence[Input]) -> tuple[Mismatch, ...]:
    """Return the inputs that a pipeline gives to both models and that both expect in different shapes."""
    expected = {base.name: base.shape for base in unet}
    mismatches = []
    for base in controlnet:
        if base.name in ("timestep", "controlnet_cond", "control_type"):
            continue
        actual, shape = "×".join(map(str, base.shape)), expected.get(base.name)
        if shape is None:
            cause = "a pipeline of this UNet does not give it"
            mismatches.append(Mismatch("input", base.name, actual, "no such input", cause=cause))
        # Inpainting and edit UNets take more latent channels than the ControlNets used with them.
        elif shape[1:] != base.shape[1:] and not (base.name == "sample" and base.shape[1].scale < shape[1].scale):
            cause = "pipelines give both models the same tensor"
            mismatches.append(Mismatch("input", base.name, actual, "×".join(map(str, shape)), cause=cause))
    return tuple(mismatches)


def _put_first(cause: str, mismatches: Iterable[Mismatch]) -> tuple[Mismatch, ...]:
    return tuple(replace(mismatch, cause="; ".join(filter(None, (cause, mismatch.cause)))) for mismatch in mismatches)


def _find_family(emitted: Mapping[str, tuple[Dim, ...]], inputs: Sequence[Input], config: Config, contract: Contract) -> str:
    """Name the family with these slots and this text width, unless it is the UNet's own."""
    fits = {}
    for name, known in presets.contracts().items():
        slots = {slot.name: slot.skip for slot in known.slots}
        # Without ControlNets in its header diffusers can build none for it.
        if known.header.controlnets and slots == emitted and _find_text_width(known.inputs) == _find_text_width(inputs):
            # Nearest is the UNet with the fewest inputs that the ControlNet lacks, then with the most settings in common.
            lacking = {base.name for base in known.inputs} - {base.name for base in inputs}
            shared = sum(key in known.config and value == known.config[key] for key, value in config.items())
            fits[name] = (-len(lacking), shared)
    nearest = _list_families(name for name, likeness in fits.items() if likeness == max(fits.values()))
    if not nearest or nearest & _list_families(find_families(contract)):
        return ""
    return f"this ControlNet was made for {' or '.join(sorted(nearest))}"


def _compare_configs(controlnet: Config, unet: Config) -> str:
    own, other = controlnet.to_json(), unet.to_json()
    keys = [key for key in _SHAPING_KEYS if key in own and key in other and own[key] != other[key]]
    differing = ", ".join(f"{key} {own[key]} (UNet: {other[key]})" for key in keys)
    return f"the ControlNet's config has another {differing}" if differing else ""


def _list_families(names: Iterable[str]) -> set[str]:
    return {presets.load(name).family for name in names}


def _find_text_width(inputs: Sequence[Input]) -> Dim | None:
    return next((base.shape[-1] for base in inputs if base.name == "encoder_hidden_states"), None)
