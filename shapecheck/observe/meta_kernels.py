"""Shapes of linear layers, normalisations, activations and plain arithmetic on the meta device.

PyTorch computes them through general Python decompositions, which take two thirds of the time of a UNet's meta run.
All but the linear layer give back the shape of their operand; what is less plain is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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


def _arithmetic(operation: Callable[..., Any], operand: Tensor, other: Tensor | float, **scales: Any) -> Any:
    # Two tensors that are laid out alike need neither broadcasting nor promotion.
    layouts = {
        (value.shape, value.dtype, value.device, value.stride()) for value in (operand, other) if isinstance(value, Tensor)
    }
    plain = len(layouts) == 1 and isinstance(other, (Tensor, int, float)) and operand.is_floating_point()
    return torch.empty_like(operand) if plain else operation(operand, other, **scales)


_ARITHMETIC = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor)
META_KERNELS: Mapping[Any, Callable[..., Any]] = {
    _aten.addmm.default: _addmm,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_layer_norm.default: _layer_norm,
    **dict.fromkeys(
        (_aten._safe_softmax.default, _aten._softmax.default, _aten.gelu.default, _aten.silu.default), _like_operand
    ),
    **{operation: partial(_arithmetic, operation) for operation in _ARITHMETIC},
}
