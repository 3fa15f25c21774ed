"""The shape of every value in a graph at given input sizes, and the first node that cannot work there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx.shape_inference import InferenceError, infer_shapes
from onnxscript import optimizer

from shapecheck.contract import Shape, show
from shapecheck.contract.errors import one_line

FEW = 64
"""Elements of a tensor that may hold sizes; a larger one is a weight, and never read."""


_FIRST = re.compile(r"\(op_type:\s*(?P<op>\w+)(?:, node name: (?P<name>[^)]*))?\): (?:\[\w+\] )?(?P<reason>[^\n]*)")


_DISAGREEING = re.compile(r"Inferred=(\d+) Declared=(\d+) Dimension=(\d+)")


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes by value name, where they are known."""

    known: Mapping[str, Shape]
    fault: str
    """The first node that cannot work at these sizes, and why; empty where all can."""


def parameters_to_inputs(graph: ir.Graph) -> None:
    """Make every weight an input without a value, so that nothing can read it; tensors that may hold sizes stay."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > FEW:
            del graph.initializers[name]
            value.const_value = None
            if not value.is_graph_input():
                graph.inputs.append(value)


def shapes_at(model: ir.Model, given: Mapping[str, Sequence[int | None]]) -> Shapes:
    """Every shape where the inputs have the given ones; an input that is not given has the shape the file declares.

    `model` has its weights among its inputs, as `parameters_to_inputs` leaves them, and is not changed.
    """
    proto = _sized(ir.to_proto(model), given)
    found = _inferred(proto)
    if not found.fault and all(each.name in found.known for each in proto.graph.output):
        return found
    folded = ir.from_proto(proto)
    optimizer.fold_constants(folded, onnx_shape_inference=True, should_fold=_unless_large)  # onnx propagates no division
    return _inferred(ir.to_proto(folded))


def _sized(proto: onnx.ModelProto, given: Mapping[str, Sequence[int | None]]) -> onnx.ModelProto:
    """With the given inputs, and without what the file declares of other values: it may be true of one size only."""
    for each in proto.graph.input:
        if (shape := given.get(each.name)) is not None:
            each.type.CopyFrom(onnx.helper.make_tensor_type_proto(each.type.tensor_type.elem_type, shape))
    del proto.graph.value_info[:]
    for each in proto.graph.output:
        each.type.tensor_type.ClearField("shape")
    for node in proto.graph.node:
        if node.op_type == "GroupNormalization" and not node.domain:
            # onnx has no inference rule for it; what it does to a shape is nothing
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]
    return proto


def _inferred(proto: onnx.ModelProto) -> Shapes:
    try:
        graph, fault = infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True).graph, ""
    except InferenceError as error:
        graph, fault = infer_shapes(proto).graph, _first(str(error))
    values = (*graph.input, *graph.initializer, *graph.value_info, *graph.output)
    known = {value.name: shape for value in values if (shape := _shape(value)) is not None}
    return Shapes(known, one_line(fault or _lost_elements(graph, known), 200))


def _unless_large(node: ir.Node) -> bool | None:
    """What the folding pass asks: fold only what makes a few numbers, as sizes are."""
    shapes = [value.shape for value in node.outputs]
    few = all(shape is not None and shape.is_static() and math.prod(shape.numpy()) <= FEW for shape in shapes)
    return None if few else False


def _first(text: str) -> str:
    """The first fault in onnx's message, which goes on with all that follow from it."""
    match = _FIRST.search(text)
    if match is None:
        return " ".join(text.split())[:200]
    sizes = _DISAGREEING.search(match["reason"])
    reason = f"sizes {sizes[1]} and {sizes[2]} meet on axis {sizes[3]}" if sizes else match["reason"]
    return f"{match['op']} {match['name'] or ''}: {reason}"[:200]


def _lost_elements(graph: onnx.GraphProto, known: Mapping[str, Shape]) -> str:
    """The first Reshape that loses or gains elements, which onnx's own rule does not look at."""
    for node in graph.node:
        if node.op_type == "Reshape":
            before, after = known.get(node.input[0], ()), known.get(node.output[0], ())
            if before and after and math.prod(before) != math.prod(after):
                return f"Reshape {node.name}: {show(before)} cannot be reshaped to {show(after)}"
    return ""


def _shape(value: onnx.ValueInfoProto | onnx.TensorProto) -> Shape | None:
    if isinstance(value, onnx.TensorProto):
        return tuple(value.dims)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)
