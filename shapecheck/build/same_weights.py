"""Whether the weights in an ONNX file are those of a module, value by value, as far as their names tell which they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shapecheck.build import weights
from shapecheck.build.external import tensors_of
from shapecheck.build.weights import Embedded, Stored


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison of weights came to."""

    same: int
    different: tuple[str, ...]
    """Names of the module's tensors whose values the file has otherwise."""


def compare_weights(path: Path, state: Mapping[str, Tensor]) -> Compared:
    """The file's tensors beside those of a state dict, which must be in the file's precision.

    Exporters call weights by their state-dict names, or by those behind a prefix (`model.`, `unet.`); what is called
    otherwise, such as a transposed weight, is not compared. Raises ShapecheckError where the file cannot be read.
    """
    same, different = 0, []
    for name, tensor in tensors_of(path).items():
        own = _own_name(name, state)
        if own is None or tensor.shape != tuple(state[own].shape):
            continue
        if _equal(tensor, state[own]):
            same += 1
        else:
            different.append(own)
    return Compared(same, tuple(different))


def _own_name(name: str, state: Mapping[str, Tensor]) -> str | None:
    while name not in state:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def _equal(tensor: Stored | Embedded, live: Tensor) -> bool:
    if isinstance(tensor, Stored):
        return not weights.differing({"": tensor}, {"": live})
    dtype = getattr(torch, tensor.dtype, None)
    if dtype != live.dtype or not tensor.data:
        return dtype == live.dtype
    return torch.equal(torch.frombuffer(bytearray(tensor.data), dtype=dtype), live.detach().cpu().reshape(-1))
