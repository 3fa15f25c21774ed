"""How a model's forward is called: from values by the contract's names to keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shapecheck.contract.contract import Contract


def grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a forward, from values by `Input.argument`: `added_cond_kwargs.time_ids` goes into a table."""
    arguments: dict[str, Any] = {"encoder_hidden_states": None}  # a forward requires it, even where it takes no text
    for argument, value in values.items():
        group, _, key = argument.rpartition(".")
        (arguments.setdefault(group, {}) if group else arguments)[key] = value
    return arguments


def arguments(contract: Contract, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the UNet's forward, from a value for every input and every slot of its contract."""
    call = grouped({each.argument: values[each.name] for each in contract.inputs})
    if contract.slots:
        *downs, mid = (values[slot.name] for slot in contract.slots)
        call |= {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
    return call
