"""An ONNX file beside the module it was made of: whether the weights are the same, and where it computes in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor

from shapecheck.models import weights
from shapecheck.models.safetensors import TensorLocation
from shapecheck.models.weights import Embedded
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.fp8_graph import find_fp8_nodes

_WIDTHS = {TensorProto.DOUBLE: 64, TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}
_HALVES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
_PRODUCTS = frozenset(("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"))
_QUANTIZING = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"))


@dataclass(frozen=True, slots=True)
class Compared:
    """The result of a comparison of weights."""

    same: int
    different: tuple[str, ...]
    """Names of the module's tensors that have other values in the file."""


def compare_weights(file: OnnxFile, state: Mapping[str, Tensor]) -> Compared:
    """Compare the file's tensors with those of a state dict, which must be in the file's precision.

    Exporters call weights by their state-dict names, or by those behind a prefix (`model.`, `unet.`); a weight of another
    name, such as a transposed one, is not compared. Raises ShapecheckError if the file cannot be read.
    """
    same, different = 0, []
    for name, tensor in file.tensors.items():
        key = name
        while key and key not in state:  # one suffix at a time: a hostile name has as many as it has dots
            key = key.partition(".")[2]
        if not key or tensor.shape != tuple(state[key].shape):
            continue
        if weights.is_equal(tensor, state[key]) or (tensor.dtype == "float32" and _rounds_to(tensor, state[key])):
            same += 1
        else:
            different.append(key)
    return Compared(same, tuple(different))


def _rounds_to(stored: TensorLocation | Embedded, live: Tensor) -> bool:
    """Return whether float32 values, rounded, are those of a half precision: inside such a file some are kept in float32."""
    flat, start = live.detach().reshape(-1).cpu(), 0
    if live.dtype not in (torch.float16, torch.bfloat16):
        return False
    for chunk in weights.read_chunks(stored):
        if not torch.equal(chunk.to(live.dtype), flat[start : start + len(chunk)]):
            return False
        start += len(chunk)
    return start == len(flat)


def find_precision(file: OnnxFile, declared: str) -> str:
    """Return the precision that a file computes in: that of its convolutions' and products' weights, if it is one.

    Converters to half precision may leave inputs and outputs in float32. Without such weights it is what the inputs declare.
    """
    graph = file.proto.graph
    dtypes = {weight.name: weight.data_type for weight in graph.initializer if len(weight.dims) > 1}
    products = [node for node in graph.node if node.op_type in _PRODUCTS]
    found = {dtypes[node.input[1]] for node in products if len(node.input) > 1 and node.input[1] in dtypes}
    names = [_HALVES[dtype] for dtype in found if dtype in _HALVES]
    return names[0] if len(found) == 1 and names else declared


def find_narrower(file: OnnxFile, dtype: str, *, with_fp8: bool = False) -> tuple[str, ...]:
    """Return what computes in fewer bits than `dtype`, by name: weights of a narrower type, casts to one, quantized operators.

    A half-precision graph that casts up now and then is fine; so `with_fp8` is what rounds to float8 and back. Raises
    ShapecheckError if the file cannot be read.
    """
    graph, least = file.proto.graph, torch.finfo(getattr(torch, dtype)).bits
    in_fp8 = find_fp8_nodes(graph) if with_fp8 else frozenset()
    narrower = [
        f"weight {weight.name} is {TensorProto.DataType.Name(weight.data_type).lower()}"
        for weight in graph.initializer
        if _WIDTHS.get(weight.data_type, least) < least
    ]
    for node in graph.node:
        name = node.name or (node.output[0] if node.output else node.op_type)
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), TensorProto.FLOAT)
        if node.op_type in _QUANTIZING and not in_fp8.issuperset(node.output):
            narrower.append(f"{node.op_type} at {name}")
        elif node.op_type == "Cast" and _WIDTHS.get(to, least) < least:
            narrower.append(f"cast to {TensorProto.DataType.Name(to).lower()} at {name}")
    return tuple(narrower)
