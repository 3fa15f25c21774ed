"""float8 in PyTorch's own arithmetic: the values that an fp8 kernel reads, multiplied in the model's precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.models.calibration_record import LARGEST_CODE, CalibratedModel, choose_scale


def quantize(values: Tensor, scale: float) -> Tensor:
    """Return the nearest codes of values divided by a scale; what is larger than the largest code becomes that."""
    # PyTorch's cast makes NaN of what does not fit, or the largest code, depending on its release and device
    return (values.float() / scale).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)


def measure_magnitude(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude among some tensors; 0 if they are empty, NaN if one holds a NaN."""
    largest = [torch.linalg.vector_norm(tensor.detach().float(), float("inf")) for tensor in tensors if tensor.numel()]
    return float(torch.stack(largest).amax()) if largest else 0.0


def find_fp8_layers(module: nn.Module, model: CalibratedModel) -> dict[str, tuple[nn.Linear | nn.Conv2d, float]]:
    """Return the layers of a module that are to be in fp8, each with the scale of what goes into it, by their paths."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    scales = model.choose_scales({name: layer.weight.shape for name, layer in layers.items()})
    return {name: (layers[name], scale) for name, scale in scales.items()}


def simulate_fp8(module: nn.Module, model: CalibratedModel) -> None:
    """Round the weights of a module's fp8 layers, and at every call what goes into them, as an fp8 kernel rounds both."""
    for layer, scale in find_fp8_layers(module, model).values():
        weight = layer.weight.data
        layer.weight.data = _round(weight, choose_scale(measure_magnitude([weight])))

        def round_input(_layer: nn.Module, inputs: tuple[Any, ...], scale: float = scale) -> tuple[Any, ...]:
            return (_round(inputs[0], scale), *inputs[1:])

        layer.register_forward_pre_hook(round_input)


def _round(values: Tensor, scale: float) -> Tensor:
    return quantize(values, scale).to(values.dtype) * scale
