"""From the arguments of a diffusers forward to a tensor for every input of a contract. Strict: nothing given is dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, ShapecheckError, show
from shapecheck.contract.naming import SHAPECHECK, feature
from shapecheck.runtime.binding import CallError

ADDED = "added_cond_kwargs"


FEATURES = "down_intrablock_additional_residuals"


_KEPT = 64
"""Sizes whose zeros are remembered."""


_ADVICE = {
    f"{ADDED}.image_embeds": "image_embeds are an IP-Adapter's, for which this model was not exported: use the PyTorch UNet",
    "cross_attention_kwargs": "cross_attention_kwargs change the model itself, as a LoRA's scale does: "
    "fuse the LoRA with pipe.fuse_lora(lora_scale=…), then export",
    FEATURES: "these are a T2I-Adapter's features, for which this model was not exported: export it with --adapter",
    "attention_mask": "masks are not part of the exported model: pad the text as the tokenizer does",
    "encoder_attention_mask": "masks are not part of the exported model: pad the text as the tokenizer does",
}


_EMPTY = "diffusers pops features from the caller's list, so that a later call finds less in it: give list(features)"


_ALONE = {
    "down": "mid_block_additional_residual is missing: PyTorch takes residuals without it for a T2I-Adapter's features",
    "mid": "down_block_additional_residuals are missing: PyTorch then ignores the mid residual too",
}


class Arguments:
    """What a forward is called with, as inputs of a contract.

    Scalar timesteps become one number a row. Residuals that are all one cell, as with `global_pool_conditions`, are expanded
    to the size of their slot. Without residuals every slot gets zeros, which are made once a size, and without features every
    place of theirs.
    """

    def __init__(self, contract: Contract, device: torch.device) -> None:
        self._contract, self._device = contract, device
        self._names = {each.argument: each.name for each in contract.inputs}
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in contract.input_dtypes.items()}
        self._slots = [slot.name for slot in contract.slots] if contract.role == "unet" else []
        self._downs = self._slots[:-1]
        self._features = [slot.name for slot in contract.features]
        self._zeros: dict[Any, dict[str, Tensor]] = {}
        self._pool = torch.zeros(0, dtype=self._dtypes.get("sample", torch.float32), device=device)

    def base(self, given: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
        """The base inputs, from a forward's own arguments and those of `added_cond_kwargs`; None is nothing.

        Raises CallError for what the contract has no input for.
        """
        every = {**given, **{f"{ADDED}.{name}": value for name, value in added.items()}}
        every = {name: value for name, value in every.items() if value is not None}
        if unknown := every.keys() - self._names.keys():
            strange = [name for name in every if name in unknown]
            raise self._refused([Mismatch("surplus", name, _told(every[name]), "no such input") for name in strange], strange)
        return {self._names[name]: value for name, value in every.items()}

    def timestep(self, value: Any, sample: Any) -> Any:
        """One number a row, as float32 where the session runs: (batch,), from a number, or a tensor of one or of each row."""
        batch = len(sample) if isinstance(sample, Tensor) and sample.dim() else 1
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        value = value.to(self._device, self._dtypes["timestep"])
        return value.expand(batch).contiguous() if value.numel() == 1 and value.dim() < 2 else value

    def residuals(self, downs: Any, mid: Any, sample: Any) -> dict[str, Any]:
        """One residual a slot. Raises CallError where only one of both is given, or the model takes none."""
        if downs is None and mid is None:
            return self._zeros_for(self._slots, sample)
        if downs is None or mid is None:
            side = "mid" if downs is None else "down"
            raise self._refused([Mismatch("missing", "the residuals", f"{side} alone", "down and mid", cause=_ALONE[side])], [])
        if not isinstance(downs, (list, tuple)):
            raise ShapecheckError(f"down_block_additional_residuals is {type(downs).__name__}: a list of tensors is expected")
        if not self._slots:
            cause = "the file was exported with --no-control"
            raise self._refused([Mismatch("surplus", "the residuals", "residuals", "no slot takes any", cause=cause)], [])
        named: dict[str, Any] = dict(zip(self._downs, downs, strict=False))
        named |= {SHAPECHECK.down(index): downs[index] for index in range(len(named), len(downs))}
        named[SHAPECHECK.mid] = mid
        return self._expanded(named, sample) if _all_pooled(named.values()) else named

    def features(self, given: Any, sample: Any) -> dict[str, Any]:
        """One feature a place, from a T2I-Adapter's list, which stays as it is; zeros where there is no list.

        Raises CallError where the list is empty, or the model takes none.
        """
        if given is None:
            return self._zeros_for(self._features, sample)
        if not isinstance(given, (list, tuple)):
            raise ShapecheckError(f"{FEATURES} is {type(given).__name__}: a list of tensors is expected")
        if not self._features:
            raise self._refused([Mismatch("surplus", FEATURES, _told(given), "no such input")], [FEATURES])
        if not given:
            raise self._refused([Mismatch("missing", FEATURES, "an empty list", "a feature a down block", cause=_EMPTY)], [])
        return {feature(index): value for index, value in enumerate(given)}

    def _zeros_for(self, names: Sequence[str], sample: Any) -> dict[str, Tensor]:
        """None where the sample is no image, which is told later."""
        off = self._off(sample) if names else {}
        return off if len(off) == len(names) else {name: off[name] for name in names if name in off}

    def _shapes(self, sample: Any) -> dict[str, Shape]:
        """Of the slots, and of features; none where the sample is no image, which is told later."""
        if not isinstance(sample, Tensor) or sample.dim() != 4 or 0 in sample.shape:
            return {}
        batch, _, height, width = sample.shape
        at = Geometry(batch, height, width)
        return self._contract.shapes(at) | self._contract.feature_shapes(at)

    def _off(self, sample: Any) -> dict[str, Tensor]:
        size = getattr(sample, "shape", None)
        if size not in self._zeros:
            if len(self._zeros) == _KEPT:
                self._zeros.clear()
            made = self._made(self._shapes(sample))
            self._zeros[size] = made
        return self._zeros[size]

    def _made(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Zeros of these shapes, all views of one piece of memory: nothing ever writes there."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        if (most := max(sizes.values(), default=0)) > len(self._pool):
            self._pool = torch.zeros(most, dtype=self._pool.dtype, device=self._device)
            self._zeros.clear()
        return {name: self._pool[: sizes[name]].view(shape) for name, shape in shapes.items()}

    def _expanded(self, named: Mapping[str, Tensor], sample: Any) -> dict[str, Tensor]:
        shapes = self._shapes(sample)
        return {name: each.expand(-1, -1, *shapes[name][2:]) if name in shapes else each for name, each in named.items()}

    def _refused(self, found: Sequence[Mismatch], unknown: Sequence[str]) -> CallError:
        return CallError(tuple(found), (), list(self._advice(unknown)), contract=self._contract)

    def _advice(self, unknown: Sequence[str]) -> Iterator[str]:
        yield from dict.fromkeys(_ADVICE[name] for name in unknown if name in _ADVICE)
        if any(name not in _ADVICE for name in unknown):
            yield f"forward takes {', '.join(self._names)}" + "".join(
                f", and the {what}" for what, names in (("residuals", self._slots), ("features", self._features)) if names
            )


def _all_pooled(values: Any) -> bool:
    return all(isinstance(each, Tensor) and each.dim() == 4 and each.shape[2:] == (1, 1) for each in values)


def _told(value: Any) -> str:
    return show(tuple(value.shape)) if isinstance(value, Tensor) else f"{type(value).__name__}"
