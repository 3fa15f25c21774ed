"""ONNX Runtime's own operators, written as those of ONNX that give the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper

ADDEND = 3
"""The place of what ONNX Runtime's convolutions add to their result."""
_PLAIN, _BLOCKED = "com.microsoft", "com.microsoft.nchwc"


def _keep_shape(node: NodeProto) -> list[NodeProto]:
    """Every output is as large as the first input: of some norms the sum that they are of, too."""
    return [helper.make_node("Identity", node.input[:1], [output], node.name) for output in node.output if output]


def _convolve_channels_last(node: NodeProto) -> list[NodeProto]:
    image, weight, result = (f"{node.output[0]} {part}" for part in ("image", "weight", "result"))
    plain = NodeProto.FromString(node.SerializeToString())
    plain.input[:2], plain.output[:] = [image, weight], [result]
    return [
        helper.make_node("Transpose", [node.input[0]], [image], perm=[0, 3, 1, 2]),
        helper.make_node("Transpose", [node.input[1]], [weight], perm=[0, 3, 1, 2]),
        *_convolve(plain),
        helper.make_node("Transpose", [result], node.output, perm=[0, 2, 3, 1]),
    ]


def _halve(node: NodeProto) -> list[NodeProto]:
    """Half of the last axis is the gate of the other."""
    numbers = {f"{node.output[0]} {name}": number for name, number in (("first", 0), ("end", 2**62), ("axis", -1), ("step", 2))}
    nodes = [_make_number(name, number) for name, number in numbers.items()]
    return [*nodes, helper.make_node("Slice", [node.input[0], *numbers], node.output, node.name)]


def _attend(node: NodeProto) -> list[NodeProto]:
    """The result is as large as the query, or as one of three that are packed: (batch, length, heads, 3, width)."""
    if len(node.input) > 1 and node.input[1]:
        return [helper.make_node("Identity", node.input[:1], node.output[:1], node.name)]
    first, heads, shape = (f"{node.output[0]} {part}" for part in ("first", "heads", "shape"))
    return [
        helper.make_node("Constant", [], [first], value=helper.make_tensor(first, TensorProto.INT64, [], [0])),
        helper.make_node("Constant", [], [shape], value=helper.make_tensor(shape, TensorProto.INT64, [3], [0, 0, -1])),
        helper.make_node("Gather", [node.input[0], first], [heads], node.name, axis=3),
        helper.make_node("Reshape", [heads, shape], node.output[:1]),
    ]


def _make_number(name: str, number: int) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [1], [number]))


def _convolve(node: NodeProto) -> list[NodeProto]:
    known = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute if entry.name in known}
    if len(node.input) <= ADDEND or not node.input[ADDEND]:
        return [helper.make_node("Conv", node.input[:3], node.output, node.name, **attributes)]
    bare = f"{node.output[0]} bare"
    return [
        helper.make_node("Conv", node.input[:3], [bare], node.name, **attributes),
        helper.make_node("Add", [bare, node.input[ADDEND]], node.output),
    ]


def _multiply(node: NodeProto) -> list[NodeProto]:
    is_turned = {entry.name: bool(entry.i) for entry in node.attribute if entry.name in ("transA", "transB")}
    first, second = "ji" if is_turned.get("transA") else "ij", "kj" if is_turned.get("transB") else "jk"
    equation = f"...{first},...{second}->...ik"
    return [helper.make_node("Einsum", node.input[:2], node.output, node.name, equation=equation)]


def _divide(node: NodeProto) -> list[NodeProto]:
    """Blocks of channels are what they were in one piece."""
    if not any(entry.name == "channels_last" and entry.i for entry in node.attribute):
        return _keep_shape(node)
    return [helper.make_node("Transpose", node.input[:1], node.output, node.name, perm=[0, 3, 1, 2])]


def _restore(node: NodeProto) -> list[NodeProto]:
    """Cut off the channels that fill the last block."""
    attributes, output = {entry.name: entry.i for entry in node.attribute}, node.output[0]
    cut = f"{output} cut" if attributes.get("channels_last") else output
    numbers = {f"{output} starts": 0, f"{output} ends": attributes.get("channels", 2**31), f"{output} axes": 1}
    nodes = [_make_number(name, number) for name, number in numbers.items()]
    nodes.append(helper.make_node("Slice", [node.input[0], *numbers], [cut], node.name))
    if cut != output:
        nodes.append(helper.make_node("Transpose", [cut], [output], perm=[0, 2, 3, 1]))
    return nodes


_WRITINGS: Mapping[tuple[str, str], Callable[[NodeProto], list[NodeProto]]] = {
    ("", "GroupNormalization"): _keep_shape,  # of which onnx has no rule
    ("", "SimplifiedLayerNormalization"): _keep_shape,
    **{
        (_PLAIN, operator): _keep_shape
        for operator in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasAdd", "BiasSoftmax", "BiasDropout", "GroupNorm")
    },
    **{(_PLAIN, f"Skip{norm}"): _keep_shape for norm in ("LayerNormalization", "SimplifiedLayerNormalization", "GroupNorm")},
    (_PLAIN, "BiasSplitGelu"): _halve,
    (_PLAIN, "MultiHeadAttention"): _attend,
    (_PLAIN, "NhwcConv"): _convolve_channels_last,
    (_PLAIN, "FusedConv"): _convolve,
    (_PLAIN, "FusedMatMul"): _multiply,
    (_PLAIN, "TransposeMatMul"): _multiply,
    (_BLOCKED, "Conv"): _convolve,
    (_BLOCKED, "ReorderInput"): _divide,
    (_BLOCKED, "ReorderOutput"): _restore,
}
"""From domain and operator to what writes it otherwise."""


def can_be_followed(node: ir.Node) -> bool:
    """Return whether a node that ONNX does not know is written so that its shapes can be followed."""
    return (node.domain, node.op_type) in _WRITINGS


def rewrite(graph: onnx.GraphProto) -> None:
    """Replace every such node by others, in its place."""
    if not any((node.domain, node.op_type) in _WRITINGS for node in graph.node):
        return
    nodes: list[NodeProto] = []
    for node in graph.node:
        write = _WRITINGS.get((node.domain, node.op_type))
        nodes += write(node) if write is not None else [node]
    del graph.node[:]
    graph.node.extend(nodes)
