"""An ONNX file beside the module it was made of: whether the weights are the same, and where it computes in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import NodeProto, TensorProto
from torch import Tensor

from shapecheck.models import weights
from shapecheck.onnx.file import OnnxFile

_WIDTHS = {TensorProto.DOUBLE: 64, TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}


_EXPECTED_WIDTHS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}


_QUANTIZING = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"))


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison of weights came to."""

    same: int
    different: tuple[str, ...]
    """Names of the module's tensors whose values the file has otherwise."""


def compare_weights(file: OnnxFile, state: Mapping[str, Tensor]) -> Compared:
    """Compare the file's tensors with those of a state dict, which must be in the file's precision.

    Exporters call weights by their state-dict names, or by those behind a prefix (`model.`, `unet.`); what is called
    otherwise, such as a transposed weight, is not compared. Raises ShapecheckError if the file cannot be read.
    """
    same, different = 0, []
    for name, tensor in file.tensors.items():
        own = _own_name(name, state)
        if own is None or tensor.shape != tuple(state[own].shape):
            continue
        if weights.is_equal(tensor, state[own]):
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


def find_narrower(file: OnnxFile, dtype: str) -> tuple[str, ...]:
    """Return what computes in fewer bits than `dtype`: weights of a narrower type, casts to one, quantised operators; by name.

    A half-precision graph that casts up now and then is no finding. Raises ShapecheckError if the file cannot be read.
    """
    graph, least = file.proto.graph, _EXPECTED_WIDTHS[dtype]
    weights = [
        f"weight {weight.name} is {TensorProto.DataType.Name(weight.data_type).lower()}"
        for weight in graph.initializer
        if _WIDTHS.get(weight.data_type, least) < least
    ]
    return (*weights, *(lowered for node in graph.node if (lowered := _describe_lowered(node, least))))


def _describe_lowered(node: NodeProto, least: int) -> str:
    called = node.name or (node.output[0] if node.output else node.op_type)
    if node.op_type in _QUANTIZING:
        return f"{node.op_type} at {called}"
    if node.op_type == "Cast":
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), TensorProto.FLOAT)
        if _WIDTHS.get(to, least) < least:
            return f"cast to {TensorProto.DataType.Name(to).lower()} at {called}"
    return ""
