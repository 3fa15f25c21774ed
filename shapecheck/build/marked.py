"""An ONNX file with values from its inside as further outputs, its weights left where they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from shapecheck.build import onnx_file
from shapecheck.contract import ShapecheckError
from shapecheck.observe.configfile import one_line


def output_name(value: str) -> str:
    """What `marked` calls the output that shows a value."""
    return f"shapecheck.marked/{value}"


def marked(path: Path, values: Iterable[str]) -> bytes:
    """An ONNX file whose further outputs, named by `output_name`, are these of its values as float32.

    Weights in other files stay there and are not read: the bytes are to be opened with the file's folder. Raises
    ShapecheckError where the file has no such value, or where it would not fit into one message of protobuf (2 GiB).
    """
    proto, values = onnx_file.load(path), tuple(dict.fromkeys(values))
    known = {name for node in proto.graph.node for name in node.output}
    if unknown := [value for value in values if value not in known]:
        raise ShapecheckError(f"{path} has no value {one_line(', '.join(unknown), 300)}")
    for value in values:
        element = _element(proto.graph, value)
        proto.graph.node.append(onnx.helper.make_node("Cast", [value], [output_name(value)], to=element))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(output_name(value), element, None))
    try:
        return bytes(proto.SerializeToString())
    except Exception as error:  # protobuf's own error class, or ValueError
        raise ShapecheckError(f"{path} cannot be given further outputs: {one_line(error, 200)}") from None


def _element(graph: onnx.GraphProto, value: str) -> int:
    """float64 where the file says so of the value, or computes in it altogether; else float32."""
    declared = {each.name: each.type.tensor_type.elem_type for each in (*graph.output, *graph.value_info)}
    is_double = declared.get(value, graph.output[0].type.tensor_type.elem_type) == onnx.TensorProto.DOUBLE
    return int(onnx.TensorProto.DOUBLE if is_double else onnx.TensorProto.FLOAT)
