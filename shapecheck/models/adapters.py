"""Read the weights of a live model with adapters of peft, such as LoRAs, as they are once merged; the model stays as it is.

A layer computes with its own weight and what its active adapters add, which peft's own `merge` gives: a copy of one layer at a
time is merged, when its values are read.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import Shape, ShapecheckError
from shapecheck.contract.errors import one_line

_NOTES = ("peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing", "_prepare_lora_hotswap_kwargs")
"""Attributes in which diffusers notes that a model has adapters, or had some."""


@dataclass(frozen=True, slots=True, eq=False)
class MergedTensor:
    """A parameter of a layer with adapters, with what they add to it."""

    layer: Any
    """The layer as peft made it."""
    path: str
    """The layer's place in the model."""
    key: str
    dtype: str
    shape: Shape
    nbytes: int

    def merge(self) -> Tensor:
        """Return the values, computed from what the layer holds now. Raises ShapecheckError if peft cannot merge the layer."""
        _refuse_changed(self.layer, self.path)
        try:
            with torch.no_grad():
                layer = copy.deepcopy(self.layer)
                # as peft's forward does: beside merged adapters it leaves out those that are not
                if layer.merged and layer.disable_adapters:
                    layer.unmerge()
                elif not layer.merged and not layer.disable_adapters:
                    layer.merge()
                merged: Tensor = layer.get_base_layer().state_dict()[self.key]
        except Exception as error:  # an adapter of any kind may refuse
            raise ShapecheckError(
                f"the adapters of {self.path} cannot be merged into its weights: {one_line(error, longest=300)}; "
                "unload them with pipe.unload_lora_weights()"
            ) from error
        if tuple(merged.shape) != self.shape:
            raise ShapecheckError(f"the adapters of {self.path} change the shape of its {self.key}: merge them yourself")
        return merged


LiveTensor = Tensor | MergedTensor


def is_adapted(value: LiveTensor) -> bool:
    """Return whether adapters add something to a parameter, as far as can be told without its values."""
    return isinstance(value, MergedTensor) and (value.layer.merged or not value.layer.disable_adapters)


def find_adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with adapters, by their paths."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # nobody has made one
        return {}
    return {path: module for path, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


def read_state(model: nn.Module) -> dict[str, LiveTensor]:
    """Return the state dict of a model as if its adapters were merged and gone. Raises ShapecheckError if they cannot be.

    Values of merged layers are computed when they are read.
    """
    layers, state = find_adapted(model), dict[str, LiveTensor](model.state_dict())
    for path, layer in layers.items():
        base: Any = layer.base_layer
        _refuse_changed(layer, path)
        for name in [name for name in state if name.startswith(f"{path}.")]:
            del state[name]
        for key, value in base.state_dict().items():
            dtype = str(value.dtype).removeprefix("torch.")
            state[f"{path}.{key}"] = MergedTensor(layer, path, key, dtype, tuple(value.shape), value.nbytes)
    return state


def remove_adapters(model: nn.Module) -> nn.Module:
    """Return a model without its adapters: itself if it never had any, else a copy that shares its tensors."""
    if not find_adapted(model) and vars(model).keys().isdisjoint(_NOTES):
        return model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, shared)
    for path, layer in find_adapted(plain).items():
        plain.set_submodule(path, layer.base_layer)  # type: ignore[arg-type]
    for note in _NOTES:
        vars(plain).pop(note, None)
    return plain


def _refuse_changed(layer: Any, path: str) -> None:
    """Raise ShapecheckError if the layer computes something else than peft merges, such as a hook of the user's on it."""
    if find_adapted(layer.base_layer):
        raise ShapecheckError(f"{path} has adapters on a layer that has adapters: merge those inside first")
    if type(layer).forward.__module__.partition(".")[0] != "peft":
        raise ShapecheckError(f"the LoRA on {path} has another forward than peft's, which no merged weight holds: restore it")
    for name, module in layer.named_modules():
        if name.partition(".")[0] == "base_layer":  # it stays
            continue
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            where = f"{path}.{name}".removesuffix(".")
            raise ShapecheckError(f"{where} is of a LoRA and has a hook, which no merged weight holds: remove the hook")
