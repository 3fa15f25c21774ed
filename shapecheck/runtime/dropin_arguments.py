"""Turn the arguments of a diffusers forward into a tensor for every input of a contract. No argument is dropped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, ShapecheckError
from shapecheck.contract.naming import SHAPECHECK, name_feature
from shapecheck.runtime.binding import CallError
from shapecheck.runtime.residual_checks import describe_value
from shapecheck.runtime.unet_call import DOWNS, EMPTIED, FEATURES, LONE_DOWNS, LONE_MID

_ADVICE = {
    "added_cond_kwargs.image_embeds": "image_embeds are an IP-Adapter's, for which this model was not exported: "
    "use the PyTorch UNet",
    "cross_attention_kwargs": "cross_attention_kwargs change the model itself, as a LoRA's scale does: "
    "fuse the LoRA with pipe.fuse_lora(lora_scale=…), then export",
    FEATURES: "these are a T2I-Adapter's features, for which this model was not exported: export it with --adapter",
    "attention_mask": "masks are not part of the exported model: pad the text as the tokenizer does",
    "encoder_attention_mask": "masks are not part of the exported model: pad the text as the tokenizer does",
}


class Arguments:
    """Turns what a forward is called with into inputs of a contract.

    A scalar timestep becomes one number a row. Residuals of one cell each, as with `global_pool_conditions`, are expanded to
    the size of their slots. Without residuals every slot gets zeros, made once a size; without features, so do theirs.
    """

    def __init__(self, contract: Contract, device: torch.device) -> None:
        self._contract, self._device = contract, device
        self._names = {base.argument: base.name for base in contract.inputs}
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in contract.input_dtypes.items()}
        self._labels = any(base.name == "class_labels" and len(base.shape) == 1 for base in contract.inputs)
        self._slots = [slot.name for slot in contract.slots] if contract.role == "unet" else []
        self._downs = self._slots[:-1]
        self._features = [slot.name for slot in contract.features]
        self._zeros: dict[Any, dict[str, Tensor]] = {}
        self._pool = torch.zeros(0, dtype=self._dtypes.get("sample", torch.float32), device=device)

    def base(self, arguments: Mapping[str, Any], added: Mapping[str, Any], timestep: Any) -> dict[str, Any]:
        """Return the base inputs from a forward's own arguments and those of `added_cond_kwargs`; what is empty is left out.

        `timestep`, a number, a tensor of one, or a tensor of all, becomes (batch,) on the session's device. Raises CallError
        for an argument that is not an input of the contract.
        """
        values = {**arguments, **{f"added_cond_kwargs.{name}": value for name, value in added.items()}}
        # what is empty says as little as None: some real-time programs pass caches and switches that are not used
        values = {
            name: value
            for name, value in values.items()
            if not _is_empty(value) or (name in self._names and isinstance(value, Tensor))  # an input of no size is a fault
        }
        if unknown := [name for name in values if name not in self._names]:
            surplus = (Mismatch("surplus", name, describe_value(values[name]), "no such input") for name in unknown)
            raise self._refuse(*surplus, unknown=unknown)
        sample = arguments["sample"]
        batch = len(sample) if isinstance(sample, Tensor) and sample.dim() else 1
        inputs = {self._names[name]: value for name, value in values.items()}
        if self._labels and "class_labels" in inputs:
            inputs["class_labels"] = self._place_labels(inputs["class_labels"], batch)
        if "timestep_cond" in self._dtypes and "timestep_cond" not in inputs:
            # its projection has no bias: zeros are what PyTorch computes without it
            width = self._contract.input_rules["timestep_cond"][1].scale
            inputs["timestep_cond"] = torch.zeros(batch, width, dtype=self._dtypes["timestep_cond"], device=self._device)
        return inputs | {"timestep": self.place_number("timestep", timestep, batch)}

    def _place_labels(self, value: Any, batch: int) -> Any:
        """Return numbers for classes or of a noise level, one a row, in the type of the file; what PyTorch refuses stays."""
        is_cut = isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
        if is_cut and not self._dtypes["class_labels"].is_floating_point:
            return value
        return self.place_number("class_labels", value, batch)

    def place_number(self, name: str, value: Any, length: int) -> Tensor:
        """Return an input that may be one number for `length` rows, or a tensor of all of them, on the session's device."""
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1 and value.dim() < 2:
            value = value.item()
        if isinstance(value, (int, float)):
            # Made there: copying it to a GPU would wait for all that was queued before.
            return torch.full((length,), value, dtype=self._dtypes[name], device=self._device)
        placed = torch.as_tensor(value).to(self._device, self._dtypes[name])
        return placed.expand(length).contiguous() if placed.numel() == 1 and placed.dim() < 2 else placed

    def residuals(self, downs: Any, mid: Any, sample: Any) -> dict[str, Any]:
        """Return one residual a slot. Raises CallError if only one of both is passed, or the model has no slots."""
        if downs is None and mid is None:
            return self._get_zeros(self._slots, sample)
        if downs is None or mid is None:
            side, cause = ("mid", LONE_MID) if downs is None else ("down", LONE_DOWNS)
            raise self._refuse(Mismatch("missing", "the residuals", f"{side} alone", "down and mid", cause=cause))
        if not isinstance(downs, (list, tuple)):
            raise ShapecheckError(f"{DOWNS}: got {type(downs).__name__}, expected a list of tensors")
        if not self._slots:
            cause = "the file was exported with --no-control"
            raise self._refuse(Mismatch("surplus", "the residuals", "residuals", "no slot takes any", cause=cause))
        named: dict[str, Any] = dict(zip(self._downs, downs, strict=False))
        named |= {SHAPECHECK.down(index): downs[index] for index in range(len(named), len(downs))}
        named[SHAPECHECK.mid] = mid
        if not all(isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:] == (1, 1) for value in named.values()):
            return named
        shapes = self._find_shapes(sample)
        return {name: value.expand(-1, -1, *shapes[name][2:]) if name in shapes else value for name, value in named.items()}

    def features(self, features: Any, sample: Any) -> dict[str, Any]:
        """Return one feature a down block from a T2I-Adapter's list, which stays as it is; zeros without a list.

        Raises CallError if the list is empty, or the model takes no features.
        """
        if features is None:
            return self._get_zeros(self._features, sample)
        if not isinstance(features, (list, tuple)):
            raise ShapecheckError(f"{FEATURES}: got {type(features).__name__}, expected a list of tensors")
        if not self._features:
            raise self._refuse(Mismatch("surplus", FEATURES, f"{len(features)} features", "no such input"), unknown=[FEATURES])
        if not features:
            raise self._refuse(Mismatch("missing", FEATURES, "an empty list", "a feature for each down block", cause=EMPTIED))
        return {name_feature(index): value for index, value in enumerate(features)}

    def _get_zeros(self, names: Sequence[str], sample: Any) -> dict[str, Tensor]:
        """Return zeros under these names; nothing if the sample shows no size, which is refused later."""
        if not names:
            return {}
        size = getattr(sample, "shape", None)
        if size not in self._zeros:
            if len(self._zeros) == 64:
                self._zeros.clear()
            shapes = self._find_shapes(sample)
            counts = {name: math.prod(shape) for name, shape in shapes.items()}
            # all are views of one piece of memory, since nothing ever writes there
            if (largest := max(counts.values(), default=0)) > len(self._pool):
                self._pool = torch.zeros(largest, dtype=self._pool.dtype, device=self._device)
                self._zeros.clear()
            self._zeros[size] = {name: self._pool[: counts[name]].view(shape) for name, shape in shapes.items()}
        zeros = self._zeros[size]
        return zeros if len(zeros) == len(names) else {name: zeros[name] for name in names if name in zeros}

    def _find_shapes(self, sample: Any) -> dict[str, Shape]:
        """Return the shapes of slots and features; nothing if the sample is not an image, which is refused later."""
        if not isinstance(sample, Tensor) or sample.dim() != 4 or 0 in sample.shape:
            return {}
        batch, _, height, width = sample.shape
        geometry = Geometry(batch, height, width)
        return self._contract.shapes(geometry) | self._contract.feature_shapes(geometry)

    def _refuse(self, *mismatches: Mismatch, unknown: Sequence[str] = ()) -> CallError:
        advice = list(dict.fromkeys(_ADVICE[name] for name in unknown if name in _ADVICE))
        if any(name not in _ADVICE for name in unknown):
            groups = (("residuals", self._slots), ("features", self._features))
            advice.append(
                f"forward takes {', '.join(self._names)}" + "".join(f", and the {group}" for group, names in groups if names)
            )
        return CallError(mismatches, (), advice, contract=self._contract)


def _is_empty(value: Any) -> bool:
    """Return whether an argument asks for nothing: None, a switch that is off, no text, or a collection of such alone."""
    if isinstance(value, Tensor):
        return value.numel() == 0
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_empty, value))
    return value is None or value is False or (isinstance(value, str) and not value)
