"""Products in fp8: pairs of QuantizeLinear and DequantizeLinear before what they multiply, as TensorRT reads them.

A strongly typed TensorRT network fuses such a pair into the convolution or product behind it, and computes that with fp8
kernels, if each tensor has one scale: with a scale for each channel of a weight the product would stay in half precision.
Weights stay as they are, in the file or in the checkpoint: TensorRT rounds them when it builds.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from shapecheck.onnx.file import OnnxFile

FIRST_OPSET = 19
"""The first with float8."""
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_ZERO = "shapecheck.fp8.zero"


def find_weights(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Return the products that each module's weight goes into, by the module's path; parameters are inputs of the graph."""
    products: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type in _PRODUCTS and (weight := _find_parameter(node)) is not None:
            products.setdefault(str(weight.name).removesuffix(".weight"), []).append(node)
    return products


def quantize_products(model: ir.Model, inputs: Mapping[str, float], weights: Mapping[str, float]) -> None:
    """Round in fp8 what goes into the products of these modules: `inputs` and `weights` have the scales of both, by module.

    Raises ValueError if a module has no product in the graph.
    """
    products = find_weights(model)
    if missing := sorted(inputs.keys() - products.keys()):
        raise ValueError(f"no product of {missing[0]} and {len(missing) - 1} more modules is in the graph")
    pairs = _Pairs(model)
    # One pair for a value that goes into several products, which all saw the same of it.
    scales: dict[ir.Value, float] = {}
    for module, scale in inputs.items():
        for node in products[module]:
            value = node.inputs[0]
            assert value is not None
            scales[value] = max(scale, scales.get(value, 0.0))
    quantized = {node: module for module in inputs for node in products[module]}
    for node in list(model.graph):
        if node not in quantized:
            continue
        value, parameter = node.inputs[0], _find_parameter(node)
        assert value is not None
        assert parameter is not None
        dtype = parameter.dtype  # both factors of a product are of one type
        assert dtype is not None
        node.replace_input_with(0, pairs.round(value, scales[value], dtype, node))
        # a product turns its weight after it was rounded, so that what is rounded is what the checkpoint holds
        user = node if node.inputs[1] is parameter else node.inputs[1].producer()  # type: ignore[union-attr]
        assert user is not None
        if (index := next((at for at, taken in enumerate(user.inputs) if taken is parameter), None)) is not None:
            user.replace_input_with(index, pairs.round(parameter, weights[quantized[node]], dtype, user))


def find_fp8_nodes(graph: onnx.GraphProto) -> frozenset[str]:
    """Return the outputs of the nodes that round to float8 e4m3fn or back, by the type of their zero, as `export` writes it."""
    zeros = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return frozenset(node.output[0] for node in pairs if zeros.intersection(node.input[2:3]))


def is_in_fp8(file: OnnxFile) -> bool:
    """Return whether a file computes something in fp8."""
    return bool(find_fp8_nodes(file.proto.graph))


class _Pairs:
    """The pairs in a graph, one for each value, and their constants."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._zero = self._add_constant(_ZERO, ir.tensor(0.0, dtype=ir.DataType.FLOAT8E4M3FN))

    def round(self, value: ir.Value, scale: float, dtype: ir.DataType, user: ir.Node) -> ir.Value:
        """Return a value rounded to fp8 and back, before the first node that uses it so."""
        if value not in self._rounded:
            step = self._add_constant(f"shapecheck.fp8.scale.{dtype.name.lower()}.{scale}", ir.tensor(scale, dtype=dtype))
            down = ir.node("QuantizeLinear", [value, step, self._zero])
            up = ir.node("DequantizeLinear", [down.outputs[0], step, self._zero])
            for node, kind in ((down, ir.DataType.FLOAT8E4M3FN), (up, dtype)):
                node.outputs[0].shape, node.outputs[0].dtype = value.shape, kind
            down.outputs[0].name, up.outputs[0].name = f"{value.name}.fp8", f"{value.name}.rounded"
            self._graph.insert_before(user, (down, up))
            self._rounded[value] = up.outputs[0]
        return self._rounded[value]

    def _add_constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._graph.initializers:
            constant = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self._graph.register_initializer(constant)
        return self._graph.initializers[name]


def _find_parameter(node: ir.Node) -> ir.Value | None:
    """Return the parameter that a node multiplies by, turned or not; None if it multiplies by something else."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is not None and (maker := value.producer()) is not None and maker.op_type == "Transpose":
        value = maker.inputs[0]
    return value if value is not None and value.is_graph_input() and str(value.name).endswith(".weight") else None
