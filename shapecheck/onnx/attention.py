"""Attention as the one operator that ONNX Runtime's CUDA provider computes at once. Files keep the standard's own nodes."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import onnx_ir.passes.common as passes

_DOMAIN = "com.microsoft"
_HEADS_APART = (0, 2, 1, 3)


class _Attention(NamedTuple):
    """An attention without a mask, in a graph."""

    inputs: list[ir.Value]
    """Queries, keys and values, (batch, tokens, heads × width) each."""
    heads: int
    output: ir.Value
    """The output, which has the shape of the queries."""


def read_fused(path: Path) -> bytes | None:
    """Return the bytes of a file's model with each attention as one node, its weights where they are; None if it has none.

    Only those of float16: in another precision that node is not proven to be as exact, or is missing.
    """
    model = ir.load(path)
    if not fuse_attention(model, [ir.DataType.FLOAT16]):
        return None
    fused: bytes = ir.to_proto(model).SerializeToString()
    return fused


def fuse_attention(model: ir.Model, dtypes: Collection[ir.DataType]) -> int:
    """Put ONNX Runtime's MultiHeadAttention in place of attentions of these dtypes; return how many there were.

    They are those that torch.onnx writes: products and a Softmax, or since opset 23 an Attention. Any other is left alone.
    """
    nodes = [node for node in model.graph if node.op_type in ("Softmax", "Attention")]
    found = [each for node in nodes if (each := _read_attention(node)) is not None and each.inputs[0].dtype in dtypes]
    for inputs, heads, output in found:
        fused = ir.node("MultiHeadAttention", inputs, {"num_heads": heads}, domain=_DOMAIN)
        fused.outputs[0].shape, fused.outputs[0].type = output.shape, output.type
        before = output.producer()
        assert before is not None
        model.graph.insert_before(before, fused)
        ir.convenience.replace_all_uses_with(output, fused.outputs[0])
    if found:
        model.graph.opset_imports[_DOMAIN] = 1
        passes.RemoveUnusedNodesPass()(model)
    return len(found)


def _read_attention(node: ir.Node) -> _Attention | None:
    """Return the attention that a Softmax or an Attention stands in, if it is of the form that is known here."""
    sources = _read_node(node) if node.op_type == "Attention" else _read_products(node)
    if sources is None:
        return None
    last, tensors, scale = sources
    reshaped = _find_user(_find_user(last, "Transpose", _HEADS_APART), "Reshape")
    split = [value for tensor in tensors if (value := _find_source(tensor, "Transpose", _HEADS_APART)) is not None]
    joined = [value for tensor in split if (value := _find_source(tensor, "Reshape")) is not None]
    if reshaped is None or reshaped.outputs[0].is_graph_output() or len(joined) != 3:
        return None
    output = reshaped.outputs[0]
    heads = {_find_heads(*pair) for pair in zip([*joined, output], [*split, split[0]], strict=True)}
    number, width = heads.pop() or (0, 0)
    usual = scale is None or abs(scale * width**0.5 - 1) <= 4e-3  # of two roots in float16
    return _Attention(joined, number, output) if not heads and number and usual else None


def _read_node(node: ir.Node) -> tuple[ir.Node, list[ir.Value | None], float | None] | None:
    """Return the node of the result, queries, keys and values with heads apart, and the scale if it is not the usual one."""
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    is_plain = not attributes.get("is_causal") and not attributes.get("softcap")
    without_mask = len(node.inputs) == 3 and len(node.outputs) == 1 and is_plain
    return (node, list(node.inputs), attributes.get("scale")) if without_mask else None


def _read_products(softmax: ir.Node) -> tuple[ir.Node, list[ir.Value | None], float | None] | None:
    """Return the same of Softmax((Q·c)(K·c)ᵀ)V."""
    scores, last = _find_producer(softmax.inputs[0], "MatMul"), _find_user(softmax, "MatMul")
    if scores is None or last is None or last.inputs[0] is not softmax.outputs[0]:
        return None
    left, right = (_find_producer(value, "Mul") for value in scores.inputs)
    if left is None or right is None:
        return None
    # torch.onnx joins batch and heads to turn the keys
    keys = _find_source(_find_source(_find_source(right.inputs[0], "Reshape"), "Transpose", (0, 2, 1)), "Reshape")
    factors = [ir.convenience.get_const_tensor(value) for value in (left.inputs[1], right.inputs[1]) if value is not None]
    numbers = [float(tensor.numpy().item()) for tensor in factors if tensor is not None and tensor.size == 1]
    at_end = "axis" not in softmax.attributes or softmax.attributes["axis"].value in (-1, 3)
    return (last, [left.inputs[0], keys, last.inputs[1]], math.prod(numbers)) if len(numbers) == 2 and at_end else None


def _find_user(node: ir.Node | None, operator: str, perm: tuple[int, ...] = ()) -> ir.Node | None:
    """Return the one node that reads a node's output, if it is of that kind."""
    if node is None or node.outputs[0].is_graph_output() or len(users := node.outputs[0].consumers()) != 1:
        return None
    (user,) = users
    return user if _is(user, operator, perm) else None


def _find_producer(value: ir.Value | None, operator: str, perm: tuple[int, ...] = ()) -> ir.Node | None:
    """Return the node that a value is made by, if it is of that kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and _is(node, operator, perm) else None


def _find_source(value: ir.Value | None, operator: str, perm: tuple[int, ...] = ()) -> ir.Value | None:
    """Return the first input of that node."""
    node = _find_producer(value, operator, perm)
    return node.inputs[0] if node is not None else None


def _is(node: ir.Node, operator: str, perm: tuple[int, ...]) -> bool:
    return node.op_type == operator and (not perm or tuple(node.attributes["perm"].value) == perm)


def _find_heads(joined: ir.Value, split: ir.Value) -> tuple[int, int] | None:
    """Return number and width of heads, where (batch, tokens, heads × width) and (batch, tokens, heads, width) are known."""
    flat, apart = [list(value.shape) if value.shape is not None else [] for value in (joined, split)]
    sizes = [size if isinstance(size, int) else size.value for size in apart]
    if len(flat) != 3 or len(apart) != 4 or None in sizes or flat[:2] != apart[:2]:
        return None
    heads, width = sizes[2:]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) and flat[2] == heads * width else None
