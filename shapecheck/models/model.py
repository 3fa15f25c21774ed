"""The modules to observe: built from what the user names, or taken live, with the inputs their configs ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn

from shapecheck.contract import Config, ControlNetInfo, Header, Input, ShapecheckError
from shapecheck.contract.dims import constant
from shapecheck.contract.errors import one_line
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.models.inputs import adapter_input, controlnet_inputs, unet_inputs

ControlNetChoice = str | nn.Module | Sequence[str | nn.Module] | None


AdapterChoice = str | nn.Module | Literal[True] | None
"""A T2I-Adapter, or True for the one that the UNet implies."""


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


def take_unet(model: str | nn.Module, offline: bool) -> tuple[Model, Header, tuple[lookup.ModelSource, ...]]:
    """The UNet, the contract's header as far as it is known, and the ControlNets that lie beside it.

    Raises ShapecheckError where it cannot be found or built, or is no conditional UNet.
    """
    if isinstance(model, str):
        source = lookup.find(model, "unet", offline=offline)
        module, name, beside = diffusers_models.build(source), source.name, source.controlnets
        notes = (*source.notes, *_ignored(source))
        header = Header(source=source.origin, vae_factor=source.vae_factor, notes=notes, versions=_versions())
    else:
        module, beside = unwrap_compiled(model), ()
        name = type(module).__name__
        header = Header(source=f"live {name}", versions=_versions())
    config = _config(module)
    if not diffusers_models.is_unet(module):
        raise ShapecheckError(f"{_describe(module)} is not read yet: expected a UNet2DConditionModel or a subclass of it")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else size
    native = tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None
    header = replace(header, native=native, parameters=parameters)
    return Model(module, name, unet_inputs(config, _dtype_name(module))), header, beside


def take_controlnets(
    choice: ControlNetChoice, unet: Model, beside: Sequence[lookup.ModelSource], offline: bool
) -> tuple[list[Model], tuple[str, ...]]:
    """The ControlNets to observe, and what the reader must know of the choice.

    None chosen: those that lie beside the UNet, else the one it implies, else none, which a note then says.
    """
    if choice is None and beside:
        nets, notes = [_built(source) for source in beside], [each for source in beside for each in source.notes]
    elif choice is None:
        try:
            implied = diffusers_models.implied_controlnet(unet.module)
        except ShapecheckError as error:
            return [], (f"UNet side alone: {error}",)
        nets, notes = [_controlnet(implied, f"the ControlNet {unet.name} implies")], []
    else:
        several = [choice] if isinstance(choice, (str, nn.Module)) else choice
        if isinstance(choice, nn.Module):
            several = getattr(choice, "nets", [choice])  # a MultiControlNetModel holds its ControlNets in `nets`
        nets, notes = [], []
        for one in several:
            taken, more = _take_controlnet(one, offline)
            nets += taken
            notes += more
    return nets, (*notes, *filter(None, (_own_latents(unet, net) for net in nets)))


def build_controlnets(names: Sequence[str], offline: bool) -> list[Model]:
    """The ControlNets of these names, with those saved beside them, on the meta device.

    Raises ShapecheckError where one cannot be found or built.
    """
    return [net for name in names for net in _take_controlnet(name, offline)[0]]


def take_adapters(
    choice: str | nn.Module | Literal[True], unet: Model, vae_factor: int, offline: bool
) -> tuple[list[Model], tuple[str, ...]]:
    """The T2I-Adapter to observe, or those one of which the UNet implies, and what the reader must know of the choice.

    Raises ShapecheckError where it cannot be found or built, or is none.
    """
    if choice is True:
        implied = diffusers_models.implied_adapters(unet.module, vae_factor)
        return [_adapter(module, f"the T2I-Adapter {unet.name} implies", vae_factor) for module in implied], ()
    if isinstance(choice, str):
        source = lookup.find(choice, "adapter", offline=offline)
        return [_adapter(diffusers_models.build(source), source.name, vae_factor)], (*source.notes, *_ignored(source))
    module = unwrap_compiled(choice)
    return [_adapter(module, type(module).__name__, vae_factor)], ()


def _adapter(module: nn.Module, name: str, vae_factor: int) -> Model:
    if not diffusers_models.is_adapter(module):
        raise ShapecheckError(
            f"{_describe(module)} is not read yet: expected a T2IAdapter or a subclass of it; of a MultiAdapter give one"
        )
    return Model(module, name, (adapter_input(_config(module), _dtype_name(module), vae_factor),))


def take_controlnet_alone(module: nn.Module) -> tuple[Model, Header]:
    """A ControlNet without a UNet, its conditioning_scale an input of its own, and a contract's header for it."""
    net = _controlnet(module, type(module).__name__)
    scale = Input("conditioning_scale", (constant(1),), _dtype_name(module), "conditioning_scale")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    header = Header(source=f"live {net.name}", parameters=parameters, versions=_versions())
    return replace(net, inputs=(*net.inputs, scale)), header


def describe_controlnet(net: Model) -> ControlNetInfo:
    """What a contract's header says of a ControlNet."""
    config = net.config
    pooled = bool(config.get("global_pool_conditions"))
    return ControlNetInfo(net.name, type(net.module).__name__, config["in_channels"], config.get("cross_attention_dim"), pooled)


def _take_controlnet(choice: str | nn.Module, offline: bool) -> tuple[list[Model], tuple[str, ...]]:
    """The ControlNet of that name, with those saved beside it, and what the reader must know of them."""
    if not isinstance(choice, str):
        module = unwrap_compiled(choice)
        return [_controlnet(module, type(module).__name__)], ()
    source = lookup.find(choice, "controlnet", offline=offline)
    every = (source, *source.controlnets)
    return [_built(each) for each in every], tuple(note for each in every for note in (*each.notes, *_ignored(each)))


def _built(source: lookup.ModelSource) -> Model:
    module = diffusers_models.build(source)
    if source.role == "unet":
        return _controlnet(diffusers_models.implied_controlnet(module), f"the ControlNet of {source.name}")
    return _controlnet(module, source.name)


def _controlnet(module: nn.Module, name: str) -> Model:
    config = _config(module)
    if not diffusers_models.is_controlnet(module):
        raise ShapecheckError(f"{_describe(module)} is not read yet: expected a ControlNetModel, a union one, or a subclass")
    return Model(module, name, controlnet_inputs(config, _dtype_name(module)))


def _describe(module: object) -> str:
    return f"class {type(module).__name__}"


def _own_latents(unet: Model, net: Model) -> str:
    """What a pipeline must know of the latents it gives to both, where that is no fault."""
    takes, wants = net.config["in_channels"], unet.config["in_channels"]
    if takes < wants:
        return f"{net.name} takes {takes} latent channels and the UNet {wants}: the pipeline must give each its own"
    if takes == wants and takes != net.config.get("out_channels", 4):
        return f"{net.name} takes {takes} latent channels, as the UNet does; diffusers' own pipelines give a ControlNet 4"
    return ""


def _ignored(source: lookup.ModelSource) -> tuple[str, ...]:
    keys = diffusers_models.ignored_keys(source)
    return (f"diffusers ignores these keys of {source.origin}: {one_line(', '.join(keys))}",) if keys else ()


def _config(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise ShapecheckError(f"{_describe(module)} has no diffusers config; give a diffusers model or a subclass of one")
    return config


def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((package, version(package)) for package in ("diffusers", "torch"))


def _dtype_name(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")
