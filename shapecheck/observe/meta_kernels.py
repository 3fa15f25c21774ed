"""Shapes of linear layers, normalisations, activations and plain arithmetic on the meta device.

PyTorch computes them through general Python decompositions, which take two thirds of the time of a UNet's meta run.
All but the linear layer give back the shape of their operand; what is less plain is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _like_operand(operand: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(operand)


def _group_norm(operand: Tensor, weight: Any, bias: Any, batch: int, channels: int, cells: int, groups: int, eps: float) -> Any:
    statistic = operand.new_empty(batch, groups)
    return torch.empty_like(operand), statistic, statistic


def _layer_norm(operand: Tensor, normalized: Any, *_: Any) -> Any:
    kept = operand.dim() - len(normalized)
    statistic = operand.new_empty(*operand.shape[:kept], *[1] * len(normalized))
    return torch.empty_like(operand), statistic, statistic


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **scales: Any) -> Tensor:
    if left.shape[1] != right.shape[0]:
        return _aten.addmm.default(bias, left, right, **scales)  # type: ignore[no-any-return]  # raises PyTorch's own error
    return left.new_empty(left.shape[0], right.shape[1])


def _arithmetic(operation: Callable[..., Any]) -> Callable[..., Any]:
    def shape(operand: Tensor, other: Tensor | float, **scales: Any) -> Any:
        plain = _like(operand, other) if isinstance(other, Tensor) else isinstance(other, (int, float))
        return torch.empty_like(operand) if plain and operand.is_floating_point() else operation(operand, other, **scales)

    return shape


def _like(operand: Tensor, other: Tensor) -> bool:
    """Whether two tensors need neither broadcasting nor promotion."""
    return (operand.shape, operand.dtype, operand.device, operand.stride()) == (
        other.shape,
        other.dtype,
        other.device,
        other.stride(),
    )


_ARITHMETIC = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor)

META_KERNELS: Mapping[Any, Callable[..., Any]] = {
    _aten.addmm.default: _addmm,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten._safe_softmax.default: _like_operand,
    _aten._softmax.default: _like_operand,
    _aten.gelu.default: _like_operand,
    _aten.silu.default: _like_operand,
    **{operation: _arithmetic(operation) for operation in _ARITHMETIC},
}
