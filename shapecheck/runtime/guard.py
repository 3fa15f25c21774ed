"""A guard on a live UNet: a call whose residuals would be misused, mostly in silence, is refused before it runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from shapecheck.contract import Config, Contract, ContractError, Mismatch, Shape, ShapecheckError
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.runtime.controlnet_emissions import Watch
from shapecheck.runtime.residual_checks import (
    EMPTIED,
    Shapes,
    autocast_dtype,
    describe_value,
    find_feature_faults,
    find_residual_faults,
    placed,
    read_geometry,
)
from shapecheck.runtime.unet_call import DOWNS, Call, locate_arguments, read_call

Mode = Literal["error", "warn"]


_traced: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


_DECIDING = (
    "in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
    "mid_block_type",
)  # fmt: skip
"""Config keys that tell one UNet's slots and inputs from another's."""


_INSIDE = (str(Path(torch.__file__).parent), __file__)
"""Files that lie between a warning and whoever called the UNet."""


_form = attrgetter("shape", "dtype", "device")


_Form = tuple[Shape, torch.dtype, torch.device]


class GuardError(ContractError):
    """A guarded UNet was called with residuals that it would misuse. `mismatches` holds every one of them."""


class GuardWarning(UserWarning):
    """What a GuardError says, where the guard's mode is "warn" and the call goes on."""


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
    - shapes that PyTorch would broadcast: (1, C, H, W), (C, H, W), (B, 1, H, W), and 1×1 where the contract does not say
      pooled; any other shape that is not the slot's; a number or anything else that is no tensor
    - a dtype other than the sample's (under autocast, its dtype is right as well)
    - a device other than the sample's (not where accelerate's hooks move what a module is given)
    - the mid residual without the down residuals, or these without it
    - T2I-Adapter features in a list that an earlier call has emptied or shortened by `pop`, or in a tuple; an empty list
      of down residuals

    Seen only with `controlnet=`, one module (a MultiControlNetModel counts as one) or those whose residuals are summed:

    - two residuals of one shape exchanged, or one given for two slots
    - the halves of the batch exchanged (classifier-free guidance)
    - height and width exchanged where they are equal
    - the residuals of an earlier call, though the ControlNet has run again since
    - zeros where the ControlNet gave something else

    For these the guard keeps the last two emissions of each ControlNet alive. A residual that is the very tensor the
    ControlNet returned costs no more; any other (guess mode, a strength, a sum) is compared by value, which waits for a GPU
    and takes a millisecond or more. An earlier emission that CUDA graphs have written over is not compared with.
    Only what is positively recognised is reported: scaling by a positive number, guess mode's zeros before a batch, a
    repeated batch and sums are right; masks, blends and residuals of another origin are let pass.

    Not seen: what the sample, timestep and text are; residuals that a ControlNet computed for another step, image or
    prompt and that are its last; an exchange of residuals that are equal or proportional; calls of `unet.forward` itself;
    calls that an exporter traces. The check never becomes part of a graph: guard the wrapper that `torch.compile` returns,
    since `fullgraph=True` and a strict torch.export refuse a guard within.

    Raises ShapecheckError where `mode` is unknown, or `contract` is no UNet's, has no slots or is another model's.
    """
    if mode not in ("error", "warn"):
        raise ShapecheckError(f'no guard mode {mode!r}; known: "error", "warn"')
    if not isinstance(unet, nn.Module):
        raise ShapecheckError(f"a guard is put on a UNet, not on a {type(unet).__name__}; of a pipeline give pipeline.unet")
    _require_contract_of(unwrap_compiled(unet), contract)
    return Guard(unet, contract, _modules(controlnet), mode)


class Guard:
    """What `guard` put on a UNet. `remove()`, or the end of a `with`, takes it off again."""

    def __init__(self, unet: nn.Module, contract: Contract, controlnets: Sequence[nn.Module], mode: Mode) -> None:
        self._unet, self._contract, self._mode = unwrap_compiled(unet), contract, mode
        self._places = locate_arguments(self._unet)
        self._names = tuple(slot.name for slot in contract.slots)
        self._shapes = Shapes(contract.slots)
        self._known: tuple[Any, list[_Form]] = (None, [])
        self._features: tuple[Any, int] = (None, 0)
        self._had_downs = False
        self._watch = Watch(controlnets) if controlnets else None
        # kept out of graphs that torch.compile makes, which would freeze what the hook saw when it was traced
        hook = torch.compiler.disable(self._before)  # type: ignore[no-untyped-call]
        self._removals = [unet.register_forward_pre_hook(hook, with_kwargs=True).remove]
        self._removals += self._watch.install() if self._watch else []

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

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        if torch.compiler.is_compiling() or _traced():  # an export: symbols in place of sizes
            return
        call = read_call(self._places, args, kwargs)
        if call.downs is None and call.mid is None and call.features is None:
            return
        found = [] if self._fits(call) else self._faults(call)
        if self._watch and call.downs is not None and call.mid is not None:
            found += self._value_faults(self._watch, call, {each.where for each in found})
        if found:
            self._tell(tuple(sorted(found, key=self._position)))

    def _fits(self, call: Call) -> bool:
        """Whether all is well, told quickly: the forms for a size are worked out once and kept until another size comes."""
        if call.features is not None or not isinstance(call.downs, (list, tuple)):
            return False
        try:
            given = [*map(_form, call.downs), _form(call.mid)]
            sample = (_form(call.sample), autocast_dtype(call.sample))
        except AttributeError:
            return False
        known, wanted = self._known
        if sample != known:
            wanted = self._wanted(call.sample)
            self._known = sample, wanted
        fits = given == wanted
        self._had_downs |= fits
        return fits

    def _wanted(self, sample: Tensor) -> list[_Form]:
        """What each residual has to be beside this sample; nothing where it shows no size that the UNet takes."""
        geometry = read_geometry(self._contract, sample)
        if isinstance(geometry, Mismatch):
            return []
        dtype = autocast_dtype(sample) or sample.dtype
        return [(shape, dtype, sample.device) for shape in self._shapes.at(geometry)]

    def _faults(self, call: Call) -> list[Mismatch]:
        """Everything that the call itself shows to be wrong."""
        found = list(find_feature_faults(call.features, self._features))
        if isinstance(call.features, list):
            self._features = (call.features, len(call.features))
        if call.downs is None and call.mid is None:
            return found
        geometry = read_geometry(self._contract, call.sample)
        if isinstance(geometry, Mismatch):
            return [*found, geometry]
        moved = "_hf_hook" in vars(self._unet)
        given = list(find_residual_faults(self._contract, call, geometry, moved))
        empty = isinstance(call.downs, (list, tuple)) and not call.downs
        if empty and self._had_downs:
            given = [replace(each, cause=EMPTIED) if each.where in self._names[:-1] else each for each in given]
        self._had_downs |= call.downs is not None and not empty
        return found + given

    def _position(self, mismatch: Mismatch) -> int:
        """Slots in their order; what is no slot after them."""
        return self._names.index(mismatch.where) if mismatch.where in self._names else len(self._names)

    def _value_faults(self, watch: Watch, call: Call, wrong: set[str]) -> list[Mismatch]:
        """What the watched ControlNets tell of the residuals with which nothing else is wrong."""
        if wrong & {"sample", DOWNS}:
            return []
        given = dict(zip(self._names, call.downs, strict=False)) | {self._names[-1]: call.mid}
        faults = watch.faults({name: value for name, value in given.items() if name not in wrong})
        return [placed(self._contract, call.sample, each) for each in faults]

    def _tell(self, found: tuple[Mismatch, ...]) -> None:
        error = GuardError(
            found, subject=f"{self._contract.class_name} is called with control that does not fit", contract=self._contract
        )
        if self._mode == "error":
            raise error
        warnings.warn(str(error), GuardWarning, stacklevel=_level())


def _modules(controlnet: nn.Module | Sequence[nn.Module] | None) -> tuple[nn.Module, ...]:
    several = isinstance(controlnet, (list, tuple, nn.ModuleList))
    modules = tuple(controlnet) if several else () if controlnet is None else (controlnet,)  # type: ignore[arg-type]
    for each in modules:
        if not isinstance(each, nn.Module):
            raise ShapecheckError(f"controlnet= takes a ControlNet or several in a list, not {describe_value(each)}")
    return modules  # type: ignore[return-value]


def _require_contract_of(unet: nn.Module, contract: Contract) -> None:
    """Raise ShapecheckError unless this can be the contract of that UNet."""
    if contract.role != "unet":
        raise ShapecheckError(
            f"a guard needs the contract of a UNet; this one is that of a {contract.role} ({contract.class_name})"
        )
    if len(contract.slots) < 2:
        raise ShapecheckError("this contract has no slots for residuals: there is nothing to guard")
    config = getattr(unet, "config", None)
    theirs = Config(config) if isinstance(config, Mapping) else Config()
    ours = contract.config
    differ = [
        f"{key}: the UNet has {theirs[key]}, the contract {ours[key]}"
        for key in _DECIDING
        if key in theirs and key in ours and theirs[key] != ours[key]
    ]
    if differ:
        raise ShapecheckError("\n  ".join(["this is the contract of another model; probe this UNet", *differ]))


def _level() -> int:
    """How many frames lie between the warning and whoever called the UNet."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
