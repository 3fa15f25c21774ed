"""The shape of every value in a graph at given input sizes, and the first node that fails there."""

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
from shapecheck.onnx.fused_operators import rewrite

_FEW = 64
"""Elements of a tensor that may hold sizes; a larger one is a weight, and never read."""
_FIRST = re.compile(r"\(op_type:\s*(?P<op>\w+)(?:, node name: (?P<name>[^)]*))?\): (?:\[\w+\] )?(?P<reason>[^\n]*)")
_DISAGREEING = re.compile(r"Inferred=(\d+) Declared=(\d+) Dimension=(\d+)")


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes by value name, as far as they are known."""

    known: Mapping[str, Shape]
    fault: str
    """The first node that fails at these sizes, and why; empty if none does."""


def parameters_to_inputs(graph: ir.Graph) -> None:
    """Make every weight an input without a value, so that nothing can read it; tensors that may hold sizes stay."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _FEW:
            del graph.initializers[name]
            value.const_value = None
            if not value.is_graph_input():
                graph.inputs.append(value)


def infer_shapes_at(model: ir.Model, sizes: Mapping[str, Sequence[int | None]]) -> Shapes:
    """Return every shape if the inputs have these; an input without an entry has the shape that the file declares.

    `model` has its weights among its inputs, as `parameters_to_inputs` leaves them, and is not changed.
    """
    proto = ir.to_proto(model)
    for value in proto.graph.input:
        if (shape := sizes.get(value.name)) is not None:
            value.type.CopyFrom(onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shape))
    # What the file declares of other values may be true of one size only.
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    rewrite(proto.graph)
    shapes = _infer(proto)
    if not shapes.fault and all(value.name in shapes.known for value in proto.graph.output):
        return shapes

    # onnx does not propagate divisions, folding does: but only of what is as small as sizes are.
    def should_fold(node: ir.Node) -> bool | None:
        outputs = [value.shape for value in node.outputs]
        few = all(shape is not None and shape.is_static() and math.prod(shape.numpy()) <= _FEW for shape in outputs)
        # A batch of 1 is known only if what TorchScript fills by this operator to expand a timestep is computed too.
        return (True if node.op_type == "ConstantOfShape" else None) if few else False

    folded = ir.from_proto(proto)
    optimizer.fold_constants(folded, onnx_shape_inference=True, should_fold=should_fold)
    return _infer(ir.to_proto(folded))


def _infer(proto: onnx.ModelProto) -> Shapes:
    # Operators take bfloat16 from opset 22 on alone, and TensorRT takes it before: it decides no shape.
    types = {value.type.tensor_type.elem_type for value in proto.graph.input}
    is_strict = onnx.TensorProto.BFLOAT16 not in types
    try:
        graph, fault = infer_shapes(proto, check_type=is_strict, strict_mode=True, data_prop=True).graph, ""
    except InferenceError as error:
        # The first fault in the message; all that follow from it come after.
        graph, fault = infer_shapes(proto).graph, " ".join(str(error).split())
        if match := _FIRST.search(str(error)):
            sizes = _DISAGREEING.search(match["reason"])
            reason = f"sizes {sizes[1]} and {sizes[2]} meet on axis {sizes[3]}" if sizes else match["reason"]
            fault = f"{match['op']} {match['name'] or ''}: {reason}"
    known = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            known[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    known |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        # onnx's own rule does not count the elements of a Reshape.
        if node.op_type == "Reshape" and not fault:
            before, after = known.get(node.input[0], ()), known.get(node.output[0], ())
            if before and after and math.prod(before) != math.prod(after):
                fault = f"Reshape {node.name}: {show(before)} cannot be reshaped to {show(after)}"
    return Shapes(known, one_line(fault, 200))
