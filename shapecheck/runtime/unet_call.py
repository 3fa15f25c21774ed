"""Read the arguments of a UNet's call that matter to residuals, however they were passed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from shapecheck.contract import ShapecheckError

DOWNS = "down_block_additional_residuals"
MID = "mid_block_additional_residual"
FEATURES = "down_intrablock_additional_residuals"
EMPTIED = (
    "diffusers pops T2I-Adapter features from the caller's list, so that a later call finds less in it: "
    "give list(features) at each call"
)
LONE_MID = f"without {DOWNS} diffusers ignores all control: give both, or neither"
LONE_DOWNS = (
    f"without {MID} diffusers takes the down residuals for T2I-Adapter features, adds them elsewhere and pops them from the "
    f"caller's list: give both, or give features as {FEATURES}"
)
_ARGUMENTS = ("sample", DOWNS, MID, FEATURES)
_ORDER = (
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "cross_attention_kwargs",
    "added_cond_kwargs", DOWNS, MID, FEATURES, "encoder_attention_mask", "return_dict",
)  # fmt: skip
"""Positional arguments of diffusers' forward: what `*args` means in a forward that wraps it."""
Places = tuple[tuple[str, int], ...]
"""Arguments by name, each with its place among the positional ones."""


class Call(NamedTuple):
    """The arguments of one call that matter here."""

    sample: Any
    downs: Any
    mid: Any
    features: Any


def locate_arguments(unet: nn.Module) -> Places:
    """Return the place of every argument that matters. Raises ShapecheckError if `forward` does not have them."""
    parameters = inspect.signature(unet.forward).parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter.name for parameter in parameters if parameter.kind in by_position]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        positional += _ORDER[len(positional) :]
    known = {parameter.name for parameter in parameters} | set(positional)
    absent = [name for name in _ARGUMENTS[:-1] if name not in known]
    if absent and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ShapecheckError(f"{type(unet).__name__}.forward takes no {', '.join(absent)}: it is called without residuals")
    # beyond any number of positional arguments: passed by keyword, if at all
    return tuple((name, positional.index(name) if name in positional else sys.maxsize) for name in _ARGUMENTS)


def read_call(places: Places, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Return the call with these arguments; what was not passed is None."""
    return Call(*[args[place] if place < len(args) else kwargs.get(name) for name, place in places])
