"""The modules to observe: built from what the user names, or taken live, with the inputs their configs ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import nn

from shapecheck.contract import Config, Header, Input, ShapecheckError
from shapecheck.contract.dims import constant
from shapecheck.contract.errors import one_line
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.models.inputs import adapter_input, controlnet_inputs, unet_inputs
from shapecheck.models.patches import refuse_patches

ControlNetChoice = str | nn.Module | Sequence[str | nn.Module] | None
AdapterChoice = str | nn.Module | Literal[True] | None
"""A T2I-Adapter, or True for the one that the UNet implies."""


@dataclass(frozen=True, slots=True)
class Model:
    """A module under observation, with its name and inputs."""

    module: nn.Module
    name: str
    inputs: tuple[Input, ...]

    @property
    def config(self) -> Config:
        return Config(_config_of(self.module))

    @property
    def device(self) -> torch.device:
        """Return the device of the weights; inputs go there too."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype


def take_unet(model: str | nn.Module, offline: bool) -> tuple[Model, Header, tuple[lookup.ModelSource, ...]]:
    """Return the UNet, the contract's header as far as it is known, and the ControlNets that lie beside it.

    Raises ShapecheckError if it cannot be found or built, or is not a conditional UNet.
    """
    if isinstance(model, str):
        source = lookup.find(model, "unet", offline=offline)
        module, name, beside = diffusers_models.build(source), source.name, source.controlnets
        header = Header(source=source.origin, vae_factor=source.vae_factor, notes=_collect_notes(source))
    else:
        module, beside = unwrap_compiled(model), ()
        refuse_patches(module)
        name = type(module).__name__
        header = Header(source=f"live {name}")
    config = _config_of(module)
    _require_class(module, diffusers_models.is_unet(module), "a UNet2DConditionModel or a subclass of it")
    size = config.get("sample_size")
    size = (size, size) if isinstance(size, int) else size
    native = tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None
    header = replace(header, native=native, parameters=_count_parameters(module), versions=_list_versions())
    return Model(module, name, unet_inputs(config, _dtype_name(module))), header, beside


def take_controlnets(
    choice: ControlNetChoice, unet: Model, beside: Sequence[lookup.ModelSource], offline: bool
) -> tuple[list[Model], tuple[str, ...]]:
    """Return the ControlNets to observe, and notes on the choice.

    If none is chosen: those that lie beside the UNet, else the one it implies, else none, and a note says so.
    """
    nets: list[Model] = []
    notes: list[str] = []
    if choice is None and beside:
        nets, notes = [_build_controlnet(source) for source in beside], [note for source in beside for note in source.notes]
    elif choice is None:
        try:
            implied = diffusers_models.derive_controlnet(unet.module)
        except ShapecheckError as error:
            return [], (f"UNet side alone: {error}",)
        nets = [_make_controlnet(implied, f"the ControlNet {unet.name} implies")]
    else:
        choices = [choice] if isinstance(choice, (str, nn.Module)) else choice
        if isinstance(choice, nn.Module):
            choices = getattr(choice, "nets", [choice])  # a MultiControlNetModel holds its ControlNets in `nets`
        for net_choice in choices:
            taken, further = _take_controlnet(net_choice, offline)
            nets += taken
            notes += further

    # a difference in latent channels is not a fault, but a pipeline must know it
    expected = unet.config["in_channels"]
    for net in nets:
        channels = net.config["in_channels"]
        takes = f"{net.name} takes {channels} latent channels"
        if channels < expected:
            notes.append(f"{takes} and the UNet {expected}: the pipeline must give each its own")
        elif channels == expected and channels != net.config.get("out_channels", 4):
            notes.append(f"{takes}, as the UNet does; diffusers' own pipelines give a ControlNet 4")
    return nets, tuple(notes)


def build_controlnets(names: Sequence[str], offline: bool) -> list[Model]:
    """Return these ControlNets and those saved beside them, on the meta device. Raises ShapecheckError if one is not built."""
    return [net for name in names for net in _take_controlnet(name, offline)[0]]


def take_adapters(
    choice: str | nn.Module | Literal[True], unet: Model, vae_factor: int, offline: bool
) -> tuple[list[Model], tuple[str, ...]]:
    """Return the T2I-Adapter to observe, or those of which the UNet implies one, and notes on the choice.

    Raises ShapecheckError if it cannot be found or built, or is not a T2I-Adapter.
    """
    notes: tuple[str, ...] = ()
    if choice is True:
        modules, name = diffusers_models.derive_adapters(unet.module, vae_factor), f"the T2I-Adapter {unet.name} implies"
    elif isinstance(choice, str):
        source = lookup.find(choice, "adapter", offline=offline)
        modules, name, notes = [diffusers_models.build(source)], source.name, _collect_notes(source)
    else:
        modules = [unwrap_compiled(choice)]
        name = type(modules[0]).__name__
    adapters = []
    for module in modules:
        expected = "a T2IAdapter or a subclass of it; of a MultiAdapter give one"
        _require_class(module, diffusers_models.is_adapter(module), expected)
        image = adapter_input(_config_of(module), _dtype_name(module), vae_factor)
        adapters.append(Model(module, name, (image,)))
    return adapters, notes


def take_controlnet_alone(module: nn.Module) -> tuple[Model, Header]:
    """Return a ControlNet without a UNet, its conditioning_scale an input of its own, and a contract's header for it."""
    net = _make_controlnet(module, type(module).__name__)
    scale = Input("conditioning_scale", (constant(1),), _dtype_name(module), "conditioning_scale")
    header = Header(source=f"live {net.name}", parameters=_count_parameters(module), versions=_list_versions())
    return replace(net, inputs=(*net.inputs, scale)), header


def _take_controlnet(choice: str | nn.Module, offline: bool) -> tuple[list[Model], tuple[str, ...]]:
    """Return a ControlNet with those saved beside it, and notes on them."""
    if not isinstance(choice, str):
        module = unwrap_compiled(choice)
        refuse_patches(module)
        return [_make_controlnet(module, type(module).__name__)], ()
    source = lookup.find(choice, "controlnet", offline=offline)
    sources = (source, *source.controlnets)
    return [_build_controlnet(net) for net in sources], tuple(note for net in sources for note in _collect_notes(net))


def _build_controlnet(source: lookup.ModelSource) -> Model:
    module = diffusers_models.build(source)
    if source.role == "unet":
        return _make_controlnet(diffusers_models.derive_controlnet(module), f"the ControlNet of {source.name}")
    return _make_controlnet(module, source.name)


def _make_controlnet(module: nn.Module, name: str) -> Model:
    config = _config_of(module)
    _require_class(module, diffusers_models.is_controlnet(module), "a ControlNetModel, a union one, or a subclass")
    return Model(module, name, controlnet_inputs(config, _dtype_name(module)))


def _require_class(module: nn.Module, fits: bool, expected: str) -> None:
    if not fits:
        raise ShapecheckError(f"class {type(module).__name__} is not supported yet: expected {expected}")


def _collect_notes(source: lookup.ModelSource) -> tuple[str, ...]:
    keys = diffusers_models.list_ignored_keys(source)
    ignored = (f"diffusers ignores these keys of {source.origin}: {one_line(', '.join(keys))}",) if keys else ()
    return (*source.notes, *ignored)


def _config_of(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise ShapecheckError(
            f"class {type(module).__name__} has no diffusers config; give a diffusers model or a subclass of one"
        )
    return config


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _list_versions() -> tuple[tuple[str, str], ...]:
    return tuple((package, version(package)) for package in ("diffusers", "torch"))


def _dtype_name(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")
