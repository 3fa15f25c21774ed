"""The sums that residuals go into, however exporters and optimisers wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from shapecheck.onnx.fused_operators import ADDEND

SAME_VALUE = ("Cast", "CastLike", "Identity", "Dropout")
SIZE_ONLY = ("Shape", "Size")
"""Operators that read no values."""
_SAME_NUMBERS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Slice", "ReorderInput", "ReorderOutput")
"""Operators that lay the same numbers out otherwise."""
_ADDITIONS = ("Add", "Sum", "Sub")


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of a skip and a residual."""

    skip: ir.Value
    """The skip, or the sum itself if no value is the whole skip as it is laid out elsewhere."""
    producer: ir.Node
    """The node that computes the last of the terms that the skip consists of."""
    value: ir.Value
    factor: float
    """What the residual is multiplied by: 1, a strength, -1 if it is subtracted; not a number if that is not constant."""


@dataclass(frozen=True, slots=True)
class _Passed:
    """The residual on its way to a sum."""

    value: ir.Value
    factor: float = 1.0
    is_moved: bool = False
    """It is laid out otherwise."""


def find_sums(residual: ir.Value, ranks: Mapping[ir.Node, int]) -> Iterator[Sum]:
    """Yield the sums that a value goes into; `ranks` are the places of the graph's nodes in the order of computation."""
    for passed in _follow(residual):
        for node in dict.fromkeys(passed.value.consumers()):
            if node not in ranks or not node.outputs:  # it is in a branch
                continue
            others = _list_others(node, passed.value)
            terms = [other for other in others if _find_maker(other)[0] in ranks]
            if node.op_type in _ADDITIONS and terms:
                yield _read_sum(node, passed, terms, ranks)
            elif node.op_type in ("Conv", "FusedConv") and node.inputs[ADDEND : ADDEND + 1] == (passed.value,):
                value = _advance(node.outputs[0], layout=node.domain.endswith("nchwc"))
                yield Sum(value, node, value, passed.factor)


def find_obstacles(residual: ir.Value) -> tuple[str, ...]:
    """Return the operators that change a value on its way to a sum, so that no more is known of it: `Clip`, `Where`."""
    found = {
        node.op_type
        for passed in _follow(residual)
        for node in passed.value.consumers()
        if node.op_type not in (*SIZE_ONLY, *_ADDITIONS) and _pass_through(node, passed.value) is None
    }
    return tuple(sorted(found))


def is_measured(residual: ir.Value) -> bool:
    """Return whether the graph reads sizes off a value, or off what it passes through on its way to a sum."""
    return any(node.op_type in SIZE_ONLY for passed in _follow(residual) for node in passed.value.consumers())


def read_factor(value: ir.Value) -> float | None:
    """Return the constant that a value, such as an output, was multiplied by last; None if it was not."""
    maker = value.producer()
    while maker is not None and maker.op_type in SAME_VALUE and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    if maker is None or maker.op_type != "Mul":
        return None
    numbers = [number for term in maker.inputs if term is not None and math.isfinite(number := _read_number(term))]
    return numbers[0] if numbers else None


def _follow(residual: ir.Value) -> list[_Passed]:
    """Return a residual and what becomes of it before it meets a skip."""
    waiting, seen = [_Passed(residual)], {residual}
    for passed in waiting:  # which grows on the way
        for node in passed.value.consumers():
            output = node.outputs[0] if node.outputs else None
            factor = _pass_through(node, passed.value)
            if output is not None and output not in seen and factor is not None:
                seen.add(output)
                is_moved = passed.is_moved or node.op_type in _SAME_NUMBERS
                waiting.append(_Passed(output, passed.factor * factor, is_moved))
    return waiting


def _pass_through(node: ir.Node, value: ir.Value) -> float | None:
    """Return what a node multiplies a value by, NaN if that is unknown; None if it does something else with it."""
    others = _list_others(node, value)
    is_first = node.inputs[0] is value
    if node.op_type in (*SAME_VALUE, *_SAME_NUMBERS):
        return 1.0 if is_first else None
    if node.op_type == "Neg":
        return -1.0
    if node.op_type in ("Mul", "Div") and len(others) == 1 and _is_scalar(others[0]) and (is_first or node.op_type == "Mul"):
        number = _read_number(others[0])
        return number if node.op_type == "Mul" or not number else 1 / number
    if node.op_type in _ADDITIONS and others and all(map(_is_constant, others)):
        return -1.0 if node.op_type == "Sub" and not is_first else 1.0
    return None


def _read_sum(node: ir.Node, passed: _Passed, terms: list[ir.Value], ranks: Mapping[ir.Node, int]) -> Sum:
    """Return the sum that begins with an addition; further terms of the skip may be added after it."""
    factor, value = passed.factor, node.outputs[0]
    if node.op_type == "Sub" and node.inputs[1] is passed.value:
        factor = -factor
    signs = {term: -1.0 if node.op_type == "Sub" and term is node.inputs[1] else 1.0 for term in terms}
    while (following := _find_only_reader(value)) is not None and following in ranks:
        sign = _pass_through(following, value)
        if sign is None:
            more = [other for other in _list_others(following, value) if _find_maker(other)[0] in ranks]
            if following.op_type not in _ADDITIONS or not more:
                break
            sign = -1.0 if following.op_type == "Sub" and following.inputs[1] is value else 1.0
            signs = {term: known * sign for term, known in signs.items()}
            signs |= {term: -1.0 if following.op_type == "Sub" and term is following.inputs[1] else 1.0 for term in more}
        elif following.op_type in _ADDITIONS or (sign == -1.0 and factor < 0):
            signs = {term: known * sign for term, known in signs.items()}
        else:
            break
        factor, value = factor * sign, following.outputs[0]

    # What is computed last is made from all the others.
    makers: list[tuple[int, ir.Node, ir.Value, float]] = []
    for term, known in signs.items():
        found = [_find_maker(term, layout=layout) for layout in (passed.is_moved, False)]
        producer, skip, sign = next(maker for maker in found if maker[0] in ranks)
        assert producer is not None
        makers.append((ranks[producer], producer, skip, sign * known))
    _, producer, skip, sign = max(makers, key=lambda maker: maker[0])
    factor /= sign
    is_moved = passed.is_moved or producer.domain.endswith("nchwc")
    value = _advance(value, layout=is_moved)
    return Sum(value if is_moved or len(signs) > 1 else skip, producer, value, factor)


def _find_maker(value: ir.Value, *, layout: bool = False) -> tuple[ir.Node | None, ir.Value, float]:
    """Return the node that computes a value, what it computes and the sign; None of a constant.

    Casts and negations behind it are passed, and with `layout` what only lays it out otherwise.
    """
    same = (*SAME_VALUE, *_SAME_NUMBERS) if layout else SAME_VALUE
    skip, sign = value, 1.0
    while (producer := skip.producer()) is not None:
        inputs = [term for term in producer.inputs if term is not None]
        if producer.op_type == "Mul":
            inputs = [term for term in inputs if _read_number(term) != -1.0]
        if producer.op_type == "Constant" or not inputs:
            return None, value, sign
        if producer.op_type not in (*same, "Neg") and not (producer.op_type == "Mul" and len(inputs) == 1):
            break
        skip, sign = inputs[0], sign if producer.op_type in same else -sign
    return producer, skip, sign


def _find_only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value, apart from its size."""
    if value.is_graph_output():
        return None
    readers = [node for node in dict.fromkeys(value.consumers()) if node.op_type not in SIZE_ONLY and node.outputs]
    return readers[0] if len(readers) == 1 else None


def _advance(value: ir.Value, *, layout: bool) -> ir.Value:
    """Return a value as it is laid out at last, if that matters."""
    while layout and (node := _find_only_reader(value)) is not None:
        if node.op_type not in _SAME_NUMBERS or node.inputs[0] is not value:
            break
        value = node.outputs[0]
    return value


def _list_others(node: ir.Node, value: ir.Value) -> list[ir.Value]:
    return [other for other in node.inputs if other is not None and other is not value]


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant"
    # a parameter may be listed among the inputs: a vector for the channels
    return value.is_initializer() or (value.shape is not None and value.shape.is_static() and len(value.shape) < 2)


def _is_scalar(value: ir.Value) -> bool:
    """Return whether a factor is one number, constant or an input: a residual times it is still that residual."""
    producer = value.producer()
    return all(dim == 1 for dim in value.shape) if value.shape is not None else producer is not None and not producer.inputs


def _read_number(value: ir.Value) -> float:
    """Return the number that a constant holds; NaN if it is not known, or not one number."""
    tensor, producer = value.const_value, value.producer()
    if producer is not None and producer.op_type == "Constant":
        attribute = next(iter(producer.attributes.values()), None)
        tensor = attribute.value if attribute is not None and attribute.type == ir.AttributeType.TENSOR else None
        if attribute is not None and attribute.type == ir.AttributeType.FLOAT:
            return float(attribute.value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size != 1:
        return math.nan
    return float(tensor.numpy().astype("float64").reshape(()))
