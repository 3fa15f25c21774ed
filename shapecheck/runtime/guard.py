"""Guard a live UNet: a call whose residuals would be misused, mostly in silence, is refused before it runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from shapecheck.contract import Config, Contract, ContractError, Geometry, Mismatch, Shape, ShapecheckError
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.controlnet_emissions import EmissionWatch
from shapecheck.runtime.residual_checks import (
    autocast_dtype,
    describe_value,
    find_feature_faults,
    find_residual_faults,
    read_geometry,
)
from shapecheck.runtime.unet_call import DOWNS, EMPTIED, Call, locate_arguments, read_call

Mode = Literal["error", "warn"]
_DECIDING = (
    "in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
    "mid_block_type",
)  # fmt: skip
"""Config keys that tell one UNet's slots and inputs from another's."""
_read_form = attrgetter("shape", "dtype", "device")


class GuardError(ContractError):
    """A guarded UNet was called with residuals that it would misuse. `mismatches` holds every one of them."""


class GuardWarning(UserWarning):
    """The text of a GuardError, as a warning: the guard's mode is "warn", and the call goes on."""


def guard(
    unet: nn.Module,
    contract: Contract,
    *,
    controlnet: nn.Module | Sequence[nn.Module] | None = None,
    mode: Mode = "error",
) -> Guard:
    """Refuse every call of `unet` whose residuals do not fit `contract`, until the returned guard is removed.

    `unet` is a live UNet2DConditionModel, or one wrapped by `torch.compile`; its contract is what `shapecheck.probe(unet)`
    returns. A call is checked before it runs, for the geometry of its `sample`, (batch, channels, height, width). In mode
    "error" it raises GuardError with everything that is wrong, slot by slot; in mode "warn" it issues one GuardWarning with
    the same text and goes on. A call without residuals is control switched off, and fine.

    Seen in the call itself:

    - too few or too many residuals, and None among them
    - shapes that PyTorch would broadcast: (1, C, H, W), (C, H, W), (B, 1, H, W), and 1×1 if the contract does not say
      pooled; any other shape that is not the slot's; anything that is not a tensor
    - a dtype other than the sample's (under autocast, its dtype is right as well)
    - a device other than the sample's (unless accelerate's hooks move what a module is called with)
    - the mid residual without the down residuals, or these without it
    - T2I-Adapter features in a tuple, or in a list that an earlier call has shortened by `pop`; empty lists

    Seen only with `controlnet=`, one module (a MultiControlNetModel counts as one) or those whose residuals are summed:

    - two residuals of one shape exchanged, or one passed for two slots
    - the halves of the batch exchanged (classifier-free guidance), or height and width when they are equal
    - the residuals of an earlier call, though the ControlNet has run again since
    - zeros in place of what the ControlNet returned

    For these the guard keeps the last two emissions of each ControlNet alive. A residual that is the very tensor the
    ControlNet returned costs no more; any other (guess mode, a strength, a sum) is compared by value, which waits for a GPU
    and takes a millisecond or more. An earlier emission that CUDA graphs have written over is not compared with.
    Only what is positively recognised is reported: scaling by a positive number, guess mode's zeros before a batch, a
    repeated batch and sums are right; masks, blends and residuals of another origin are let pass.

    Not seen: what the sample, timestep and text are; residuals that a ControlNet computed for another step, image or
    prompt and that are its last; an exchange of residuals that are equal or proportional; calls of `unet.forward` itself;
    calls that an exporter traces. The check never becomes part of a graph: guard the wrapper that `torch.compile` returns,
    since `fullgraph=True` and a strict torch.export refuse a guard within.

    Raises ShapecheckError if `mode` is unknown, or `contract` is not a UNet's, has no slots or is another model's.
    """
    if mode not in ("error", "warn"):
        raise ShapecheckError(f'no guard mode {mode!r}; known: "error", "warn"')
    if not isinstance(unet, nn.Module):
        raise ShapecheckError(f"a guard is put on a UNet, not on a {type(unet).__name__}; of a pipeline pass pipeline.unet")
    if contract.role != "unet":
        raise ShapecheckError(
            f"a guard needs the contract of a UNet; this one is that of a {contract.role} ({contract.class_name})"
        )
    if len(contract.slots) < 2:
        raise ShapecheckError("this contract has no slots for residuals: there is nothing to guard")
    config = getattr(unwrap_compiled(unet), "config", None)
    theirs, ours = Config(config) if isinstance(config, Mapping) else Config(), contract.config
    differences = [
        f"  {key}: the UNet has {theirs[key]}, the contract {ours[key]}"
        for key in _DECIDING
        if key in theirs and key in ours and theirs[key] != ours[key]
    ]
    if differences:
        raise ShapecheckError("\n".join(["this is the contract of another model; probe this UNet", *differences]))
    several = isinstance(controlnet, (list, tuple, nn.ModuleList))
    modules: tuple[Any, ...] = tuple(controlnet) if several else () if controlnet is None else (controlnet,)  # type: ignore[arg-type]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ShapecheckError(f"controlnet= takes a ControlNet or several in a list, not {describe_value(module)}")
    return Guard(unet, contract, modules, mode)


class Guard:
    """A guard on a UNet. `remove()`, or the end of a `with`, takes it off again."""

    def __init__(self, unet: nn.Module, contract: Contract, controlnets: Sequence[nn.Module], mode: Mode) -> None:
        self._unet, self._contract, self._mode = unwrap_compiled(unet), contract, mode
        self._places = locate_arguments(self._unet)
        self._names = tuple(slot.name for slot in contract.slots)
        self._known: tuple[Any, list[tuple[Shape, torch.dtype, torch.device]]] = (None, [])
        self._features: tuple[Any, int] = (None, 0)
        self._had_downs = False
        # kept out of graphs that torch.compile makes, which would freeze what the hook saw when it was traced
        hook = torch.compiler.disable(self._check_call)  # type: ignore[no-untyped-call]
        self._removals = [unet.register_forward_pre_hook(hook, with_kwargs=True).remove]
        self._watch = EmissionWatch(controlnets) if controlnets else None
        self._removals += self._watch.removals if self._watch else []

    def remove(self) -> None:
        """Take every hook off and let go of every tensor. Does nothing the second time."""
        while self._removals:
            self._removals.pop()()
        self._features = (None, 0)
        if self._watch:
            self._watch.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _check_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # an export passes symbols in place of sizes
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return
        call = read_call(self._places, args, kwargs)
        if call.downs is None and call.mid is None and call.features is None:
            return
        mismatches = [] if self._fits(call) else self._find_faults(call)
        if self._watch and call.downs is not None and call.mid is not None:
            mismatches += self._find_value_faults(self._watch, call, {mismatch.where for mismatch in mismatches})
        if not mismatches:
            return
        order = {name: number for number, name in enumerate(self._names)}
        mismatches.sort(key=lambda mismatch: order.get(mismatch.where, len(order)))
        subject = f"{self._contract.class_name} is called with control that does not fit"
        error = GuardError(tuple(mismatches), subject=subject, contract=self._contract)
        if self._mode == "error":
            raise error
        # the warning is to show the line that called the UNet, beyond this file and those of torch
        level, frame, inside = 1, sys._getframe(), (str(Path(torch.__file__).parent), __file__)
        while frame.f_back and frame.f_code.co_filename.startswith(inside):
            level, frame = level + 1, frame.f_back
        warnings.warn(str(error), GuardWarning, stacklevel=level)

    def _fits(self, call: Call) -> bool:
        """Decide quickly whether all is well: the forms for a size are worked out once and kept until another size comes."""
        if call.features is not None or not isinstance(call.downs, (list, tuple)):
            return False
        try:
            actual = [*map(_read_form, call.downs), _read_form(call.mid)]
            sample = (_read_form(call.sample), autocast_dtype(call.sample))
        except AttributeError:
            return False
        known, expected = self._known
        if sample != known:
            geometry, expected = read_geometry(self._contract, call.sample), []
            if isinstance(geometry, Geometry):
                dtype, device = autocast_dtype(call.sample) or call.sample.dtype, call.sample.device
                expected = [(shape, dtype, device) for shape in self._contract.shapes(geometry).values()]
            self._known = sample, expected
        fits = actual == expected
        self._had_downs |= fits
        return fits

    def _find_faults(self, call: Call) -> list[Mismatch]:
        mismatches = list(find_feature_faults(call.features, self._features))
        if isinstance(call.features, list):
            self._features = (call.features, len(call.features))
        if call.downs is None and call.mid is None:
            return mismatches
        geometry = read_geometry(self._contract, call.sample)
        if isinstance(geometry, Mismatch):
            return [*mismatches, geometry]
        moved = "_hf_hook" in vars(self._unet)
        faults = list(find_residual_faults(self._contract, call, geometry, moved))
        empty = isinstance(call.downs, (list, tuple)) and not call.downs
        if empty and self._had_downs:
            faults = [replace(fault, cause=EMPTIED) if fault.where in self._names[:-1] else fault for fault in faults]
        self._had_downs |= call.downs is not None and not empty
        return mismatches + faults

    def _find_value_faults(self, watch: EmissionWatch, call: Call, wrong: set[str]) -> list[Mismatch]:
        """Return what the watched ControlNets show of the residuals with which nothing else is wrong."""
        if wrong & {"sample", DOWNS}:
            return []
        residuals = dict(zip(self._names, call.downs, strict=False)) | {self._names[-1]: call.mid}
        faults = watch.find_faults({name: value for name, value in residuals.items() if name not in wrong})
        batch, _, height, width = call.sample.shape
        geometry, slot = Geometry(batch, height, width), self._contract.slot
        return [replace(fault, geometry=geometry, unet_module=slot(fault.where).producer) for fault in faults]
