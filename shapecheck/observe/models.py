"""The modules to observe: built from what the user names, or taken live, with the inputs their configs ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from shapecheck.contract import Config, ControlNetInfo, Header, Input, ShapecheckError
from shapecheck.observe import configs, sources
from shapecheck.observe.configfile import one_line
from shapecheck.observe.inputs import controlnet_inputs, unet_inputs

ControlNetChoice = str | nn.Module | Sequence[str | nn.Module] | None


@dataclass(frozen=True, slots=True)
class Model:
    """A module under observation, and what is read off it."""

    module: nn.Module
    name: str
    inputs: tuple[Input, ...]

    @property
    def config(self) -> Config:
        """The module's own configuration."""
        return Config(_config(self.module))

    @property
    def device(self) -> torch.device:
        """Where the weights lie; inputs go there too."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.module.parameters()).dtype


def take_unet(model: str | nn.Module, offline: bool) -> tuple[Model, Header, tuple[configs.ModelSource, ...]]:
    """The UNet, the contract's header as far as it is known, and the ControlNets that lie beside it.

    Raises ShapecheckError where it cannot be found or built, or is no conditional UNet.
    """
    versions = tuple((package, version(package)) for package in ("diffusers", "torch"))
    if isinstance(model, str):
        source = configs.find(model, "unet", offline=offline)
        module, name, beside = sources.build(source), source.name, source.controlnets
        notes = (*source.notes, *_ignored(source))
        header = Header(source=source.origin, vae_factor=source.vae_factor, notes=notes, versions=versions)
    else:
        module, beside = _uncompiled(model), ()
        name = type(module).__name__
        header = Header(source=f"live {name}", versions=versions)
    config = _config(module)
    if not {"up_block_types", "cross_attention_dim"} <= config.keys():
        raise ShapecheckError(f"a {type(module).__name__} is no conditional UNet: expected a UNet2DConditionModel")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    header = replace(header, native=_native(config.get("sample_size")), parameters=parameters)
    return Model(module, name, unet_inputs(config, _dtype_name(module))), header, beside


def take_controlnets(
    choice: ControlNetChoice, unet: Model, beside: Sequence[configs.ModelSource], offline: bool
) -> tuple[list[Model], tuple[str, ...]]:
    """The ControlNets to observe, and what the reader must know of the choice.

    None chosen: those that lie beside the UNet, else the one it implies, else none, which a note then says.
    """
    if choice is None and beside:
        return [_controlnet(sources.build(source), source.name) for source in beside], ()
    if choice is None:
        try:
            implied = sources.implied_controlnet(unet.module)
        except ShapecheckError as error:
            return [], (f"UNet side alone: {error}",)
        return [_controlnet(implied, f"the ControlNet {unet.name} implies")], ()
    if isinstance(choice, nn.Module):
        several = list(getattr(choice, "nets", [choice]))  # a MultiControlNetModel holds its ControlNets in `nets`
    else:
        several = [choice] if isinstance(choice, str) else list(choice)
    nets = [_take_controlnet(each, offline) for each in several]
    return nets, tuple(filter(None, (_own_latents(unet, net) for net in nets)))


def info(net: Model) -> ControlNetInfo:
    """What a contract's header says of a ControlNet."""
    config = net.config
    pooled = bool(config.get("global_pool_conditions"))
    return ControlNetInfo(net.name, type(net.module).__name__, config["in_channels"], config.get("cross_attention_dim"), pooled)


def _take_controlnet(choice: str | nn.Module, offline: bool) -> Model:
    if isinstance(choice, nn.Module):
        module = _uncompiled(choice)
        return _controlnet(module, type(module).__name__)
    source = configs.find(choice, "controlnet", offline=offline)
    module = sources.build(source)
    if source.role == "unet":
        return _controlnet(sources.implied_controlnet(module), f"the ControlNet of {choice}")
    return _controlnet(module, choice)


def _controlnet(module: nn.Module, name: str) -> Model:
    config = _config(module)
    if "conditioning_embedding_out_channels" not in config:
        raise ShapecheckError(f"a {type(module).__name__} is no ControlNetModel, the only kind of ControlNet read so far")
    return Model(module, name, controlnet_inputs(config, _dtype_name(module)))


def _own_latents(unet: Model, net: Model) -> str:
    """Inpainting and edit UNets take more latent channels than the ControlNets used with them, which is no fault."""
    takes, wants = net.config["in_channels"], unet.config["in_channels"]
    if takes == wants:
        return ""
    return f"{net.name} takes {takes} latent channels and the UNet {wants}: the pipeline must give each its own"


def _ignored(source: configs.ModelSource) -> tuple[str, ...]:
    keys = sources.ignored_keys(source)
    return (f"diffusers ignores these keys of {source.origin}: {one_line(', '.join(keys))}",) if keys else ()


def _config(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise ShapecheckError(f"a {type(module).__name__} has no diffusers config; give a diffusers model or a subclass of one")
    return config


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped: inside compiled code nothing can be watched."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def _native(sample_size: Any) -> tuple[int, int] | None:
    if isinstance(sample_size, int):
        return sample_size, sample_size
    return tuple(sample_size) if isinstance(sample_size, (list, tuple)) and len(sample_size) == 2 else None


def _dtype_name(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")
