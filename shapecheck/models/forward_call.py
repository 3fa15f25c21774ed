"""How a model's forward is called: from values by the contract's names to keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from shapecheck.contract.contract import Contract

_Module = TypeVar("_Module")


def unwrap_compiled(module: _Module) -> _Module:
    """Return the module that torch.compile wrapped, or the module itself: inside compiled code nothing can be observed."""
    original: _Module = getattr(module, "_orig_mod", module)
    return original


def group_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a forward, from values by `Input.argument`: `added_cond_kwargs.time_ids` goes into a table."""
    arguments: dict[str, Any] = {"encoder_hidden_states": None}  # a forward requires it, even where it takes no text
    for argument, value in values.items():
        group, _, key = argument.rpartition(".")
        (arguments.setdefault(group, {}) if group else arguments)[key] = value
    return arguments


def build_unet_arguments(contract: Contract, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for a forward, from a value for every input, and for every slot that a UNet takes."""
    call = group_arguments({each.argument: values[each.name] for each in contract.inputs})
    if contract.role == "controlnet":
        return call
    residuals, features = ([values[slot.name] for slot in slots] for slots in (contract.slots, contract.features))
    return call | build_residual_arguments(residuals, features)


def build_residual_arguments(residuals: Sequence[Any], features: Sequence[Any]) -> dict[str, Any]:
    """Keyword arguments for what a UNet adds: residuals in slot order, mid last, and features; nothing where there are none.

    Features are in a list of their own: diffusers pops them off it.
    """
    call: dict[str, Any] = {}
    if residuals:
        call |= {"down_block_additional_residuals": list(residuals[:-1]), "mid_block_additional_residual": residuals[-1]}
    return call | ({"down_intrablock_additional_residuals": list(features)} if features else {})
