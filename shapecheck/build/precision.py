"""Where a graph computes in less than its own precision."""

from __future__ import annotations

from pathlib import Path

from onnx import NodeProto, TensorProto

from shapecheck.build import onnx_file

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
