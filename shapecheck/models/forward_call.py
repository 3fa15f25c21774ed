"""Calls of a model's forward: from values by the contract's names to keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from shapecheck.contract import Contract

_Module = TypeVar("_Module")


def unwrap_compiled(module: _Module) -> _Module:
    """Return the module that torch.compile wrapped, or the module itself: inside compiled code nothing can be observed."""
    original: _Module = getattr(module, "_orig_mod", module)
    return original


def group_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments from values by `Input.argument`: `added_cond_kwargs.time_ids` goes into a dict of its own."""
    arguments: dict[str, Any] = {"encoder_hidden_states": None}  # a forward requires it, even if it takes no text
    for argument, value in values.items():
        group, _, key = argument.rpartition(".")
        (arguments.setdefault(group, {}) if group else arguments)[key] = value
    return arguments


def build_arguments(contract: Contract, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for a model's forward, from a value for every input and every slot of its contract."""
    call = group_arguments({entry.argument: values[entry.name] for entry in contract.inputs})
    if contract.role == "controlnet":  # its slots are what it returns
        return call
    residuals, features = ([values[slot.name] for slot in slots] for slots in (contract.slots, contract.features))
    return call | build_residual_arguments(residuals, features)


def build_residual_arguments(residuals: Sequence[Any], features: Sequence[Any]) -> dict[str, Any]:
    """Return keyword arguments for what a UNet adds: residuals in slot order, mid last, and features; none for none."""
    call: dict[str, Any] = {}
    if residuals:
        call |= {"down_block_additional_residuals": list(residuals[:-1]), "mid_block_additional_residual": residuals[-1]}
    # features need a list of their own: diffusers pops them off it
    return call | ({"down_intrablock_additional_residuals": list(features)} if features else {})
