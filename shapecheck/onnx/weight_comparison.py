"""Where a graph computes in less than its own precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import NodeProto, TensorProto
from torch import Tensor

from shapecheck.models import weights
from shapecheck.models.safetensors import Stored
from shapecheck.models.weights import Embedded
from shapecheck.onnx import file as onnx_file
from shapecheck.onnx.external import tensors_of

_WIDTHS = {TensorProto.DOUBLE: 64, TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}


_WANTED = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}


_QUANTISING = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"))


def narrower(path: Path, dtype: str) -> tuple[str, ...]:
    """What computes in fewer bits than `dtype`: weights of a narrower type, casts to one, quantised operators; by name.

    A half-precision graph that casts up now and then is no finding. Raises ShapecheckError where the file cannot be read.
    """
    graph, least = onnx_file.load(path).graph, _WANTED[dtype]
    weights = [
        f"weight {each.name} is {TensorProto.DataType.Name(each.data_type).lower()}"
        for each in graph.initializer
        if _WIDTHS.get(each.data_type, least) < least
    ]
    return (*weights, *(told for node in graph.node if (told := _lowered(node, least))))


def _lowered(node: NodeProto, least: int) -> str:
    called = node.name or (node.output[0] if node.output else node.op_type)
    if node.op_type in _QUANTISING:
        return f"{node.op_type} at {called}"
    if node.op_type == "Cast":
        to = next((each.i for each in node.attribute if each.name == "to"), TensorProto.FLOAT)
        if _WIDTHS.get(to, least) < least:
            return f"cast to {TensorProto.DataType.Name(to).lower()} at {called}"
    return ""


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
