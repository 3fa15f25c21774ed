"""Faults planted into an exported UNet that shapes cannot show, each an edit of its onnx_ir model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def _residual(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def _between(model: ir.Model, name: str, *operations: tuple[str, list, dict]) -> None:
    """Put operations between an input and all that takes it; each is (operator, further inputs, attributes)."""
    value = _residual(model, name)
    uses, first = list(value.uses()), model.graph[0]
    for operator, further, attributes in operations:
        constants = [_constant(model, f"{name} {operator} {number}", each) for number, each in enumerate(further)]
        node = ir.node(operator, [value, *constants], attributes)
        model.graph.insert_before(first, node)
        value = node.outputs[0]
    for node, index in uses:
        node.replace_input_with(index, value)


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value


def _dtype(model: ir.Model, name: str) -> np.dtype:
    return _residual(model, name).dtype.numpy()


def scaled(name: str, factor: float):
    """A residual that acts with part of its strength."""
    return lambda model: _between(model, name, ("Mul", [np.array([factor], _dtype(model, name))], {}))


def transposed(*names: str):
    """Height and width of residuals exchanged: other sizes than squares cannot be run."""

    def edit(model: ir.Model) -> None:
        for name in names:
            _between(model, name, ("Transpose", [], {"perm": [0, 1, 3, 2]}))

    return edit


def reshaped(*names: str):
    """Height and width of residuals exchanged and their shape kept, as where a buffer is read in the wrong order."""

    def edit(model: ir.Model) -> None:
        for name in names:
            value = _residual(model, name)
            uses, first = list(value.uses()), model.graph[0]
            shape = ir.node("Shape", [value])
            turned = ir.node("Transpose", [value], {"perm": [0, 1, 3, 2]})
            back = ir.node("Reshape", [turned.outputs[0], shape.outputs[0]])
            for node in (shape, turned, back):
                model.graph.insert_before(first, node)
            for node, index in uses:
                node.replace_input_with(index, back.outputs[0])

    return edit


def halves_exchanged(*names: str):
    """The halves of the batch exchanged, as where the conditional half comes first on one side."""

    def edit(model: ir.Model) -> None:
        first = model.graph[0]
        zero, two, end = (_constant(model, f"bound {each}", np.array([each])) for each in (0, 2, 2**31))
        for name in names:
            value = _residual(model, name)
            uses = list(value.uses())
            batch = ir.node("Shape", [value], {"start": 0, "end": 1})
            half = ir.node("Div", [batch.outputs[0], two])
            low = ir.node("Slice", [value, zero, half.outputs[0], zero])
            high = ir.node("Slice", [value, half.outputs[0], end, zero])
            joined = ir.node("Concat", [high.outputs[0], low.outputs[0]], {"axis": 0})
            for node in (batch, half, low, high, joined):
                model.graph.insert_before(first, node)
            for node, index in uses:
                node.replace_input_with(index, joined.outputs[0])

    return edit


def frozen(name: str, number: float):
    """An input that is taken for the same number whatever is given."""
    return lambda model: _between(
        model, name, ("Mul", [np.float32(0).reshape(1)], {}), ("Add", [np.float32(number).reshape(1)], {})
    )


def not_a_number(channel: int, channels: int):
    """One channel of the image is NaN."""

    def edit(model: ir.Model) -> None:
        (output,) = model.graph.outputs
        holes = np.zeros((1, channels, 1, 1), output.dtype.numpy())
        holes[0, channel] = np.nan
        inner = ir.Value(name="image without holes", shape=output.shape, type=output.type)
        maker = output.producer()
        node = ir.node("Add", [maker.outputs[0], _constant(model, "holes", holes)])
        model.graph.append(node)
        name, output.name = output.name, inner.name
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, output.shape, output.type
        model.graph.outputs[0] = node.outputs[0]

    return edit


def in_half(operator: str, number: int):
    """One layer computed in float16: casts around it."""

    def edit(model: ir.Model) -> None:
        node = [each for each in model.graph if each.op_type == operator][number]
        for index, value in enumerate(node.inputs):
            lowered = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)})
            model.graph.insert_before(node, lowered)
            node.replace_input_with(index, lowered.outputs[0])
        uses = list(node.outputs[0].uses())
        raised = ir.node("Cast", [node.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
        model.graph.insert_after(node, raised)
        for user, index in uses:
            user.replace_input_with(index, raised.outputs[0])

    return edit


def _replace(model: ir.Model, name: str, build) -> None:
    """Let all that takes an input take instead the last of the nodes that `build` makes of it."""
    value = _residual(model, name)
    uses, first = list(value.uses()), model.graph[0]
    nodes = build(value)
    for node in nodes:
        model.graph.insert_before(first, node)
    for node, index in uses:
        node.replace_input_with(index, nodes[-1].outputs[0])


def clipped(name: str, most: float):
    """An input whose values end at `most` to both sides, as where a narrow format saturates."""
    return lambda model: _between(model, name, ("Clip", [np.array(end, _dtype(model, name)) for end in (-most, most)], {}))


def sums_clipped(most: float, *names: str):
    """The sums of skips and residuals end at `most` to both sides."""

    def edit(model: ir.Model) -> None:
        for name in names:
            (add,) = _residual(model, name).consumers()
            uses = list(add.outputs[0].uses())
            ends = [_constant(model, f"{name} {end}", np.array(end, _dtype(model, name))) for end in (-most, most)]
            clip = ir.node("Clip", [add.outputs[0], *ends])
            model.graph.insert_after(add, clip)
            for node, index in uses:
                node.replace_input_with(index, clip.outputs[0])

    return edit


def tokens_cut(most: int):
    """Text of which only the first tokens are read."""
    bounds = [np.array([bound]) for bound in (0, most, 1)]
    return lambda model: _between(model, "encoder_hidden_states", ("Slice", bounds, {}))


def timestep_clamped(most: float):
    """Timesteps above `most` are taken for it."""
    return lambda model: _between(model, "timestep", ("Min", [np.array([most], _dtype(model, "timestep"))], {}))


def later_rows_without(rows: int, *names: str):
    """Rows of a batch after the first few are computed without these residuals, or other inputs."""

    def edit(model: ir.Model) -> None:
        zero, one, most = (_constant(model, f"row {each}", np.array(each)) for each in (0, 1, rows))
        for name in names:
            dtype, rank = _residual(model, name).dtype, len(_residual(model, name).shape)
            shape = _constant(model, f"{name} mask", np.array([-1, *[1] * (rank - 1)]))

            def build(value: ir.Value, dtype: ir.DataType = dtype, shape: ir.Value = shape) -> list[ir.Node]:
                batch = ir.node("Shape", [value], {"start": 0, "end": 1})
                count = ir.node("Squeeze", [batch.outputs[0]])
                numbers = ir.node("Range", [zero, count.outputs[0], one])
                early = ir.node("Less", [numbers.outputs[0], most])
                mask = ir.node("Cast", [early.outputs[0]], {"to": int(dtype)})
                column = ir.node("Reshape", [mask.outputs[0], shape])
                kept = ir.node("Mul", [value, column.outputs[0]])
                return [batch, count, numbers, early, mask, column, kept]

            _replace(model, name, build)

    return edit


def wrong_above(cells: int, name: str, factor: float):
    """An input that acts with part of its strength in latents of more than so many cells."""

    def edit(model: ir.Model) -> None:
        sample, first = _residual(model, "sample"), model.graph[0]
        dtype = _residual(model, name).dtype
        sides = ir.node("Shape", [sample], {"start": 2, "end": 4})
        area = ir.node("ReduceProd", [sides.outputs[0]], {"keepdims": 1})
        large = ir.node("Greater", [area.outputs[0], _constant(model, "cells", np.array([cells]))])
        as_number = ir.node("Cast", [large.outputs[0]], {"to": int(dtype)})
        change = ir.node("Mul", [as_number.outputs[0], _constant(model, "change", np.array([factor - 1], dtype.numpy()))])
        whole = ir.node("Add", [change.outputs[0], _constant(model, "whole", np.array([1], dtype.numpy()))])
        for node in (sides, area, large, as_number, change, whole):
            model.graph.insert_before(first, node)
        uses = list(_residual(model, name).uses())
        uses = [(node, index) for node, index in uses if node is not sides]
        scaled = ir.node("Mul", [_residual(model, name), whole.outputs[0]])
        model.graph.insert_before(first, scaled)
        for node, index in uses:
            node.replace_input_with(index, scaled.outputs[0])

    return edit
