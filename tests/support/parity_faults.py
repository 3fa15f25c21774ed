"""Faults planted into an exported UNet that shapes cannot show, each an edit of its onnx_ir model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_files import unconsume


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


def masked(name: str, *numbers: float):
    """An input whose channels are multiplied by these numbers, over and over: 1 and 0 lose every second."""

    def edit(model: ir.Model) -> None:
        value = _residual(model, name)
        mask = np.resize(np.array(numbers, _dtype(model, name)), value.shape[1]).reshape(1, -1, *[1] * (len(value.shape) - 2))
        _between(model, name, ("Mul", [mask], {}))

    return edit


def rolled(name: str):
    """A residual whose channels are one further."""

    def edit(model: ir.Model) -> None:
        order = np.roll(np.arange(_residual(model, name).shape[1]), 1)
        _between(model, name, ("Gather", [order], {"axis": 1}))

    return edit


def delayed(name: str, to: str):
    """A residual is added one skip later, on top of the one that belongs there."""

    def edit(model: ir.Model) -> None:
        unconsume(name)(model)
        (add,) = _residual(model, to).consumers()
        uses = list(add.outputs[0].uses())
        again = ir.node("Add", [add.outputs[0], _residual(model, name)])
        model.graph.insert_after(add, again)
        for node, index in uses:
            node.replace_input_with(index, again.outputs[0])

    return edit


def baked(name: str, number: float):
    """The same as `frozen` for an input of any type."""

    def edit(model: ir.Model) -> None:
        zero, constant = (np.array([each]).astype(_dtype(model, name)) for each in (0, number))
        _between(model, name, ("Mul", [zero], {}), ("Add", [constant], {}))

    return edit


def limited(name: str, least: float, most: float):
    """Values of an input below and above these are taken for them."""

    def edit(model: ir.Model) -> None:
        ends = [np.array(end).astype(_dtype(model, name)) for end in (least, most)]
        _between(model, name, ("Max", ends[:1], {}), ("Min", ends[1:], {}))

    return edit


def rounded(name: str):
    """An input is cut to whole numbers."""
    return lambda model: _between(model, name, ("Floor", [], {}))


def _after(model: ir.Model, name: str, *operations: tuple[str, list]) -> None:
    """Put operations behind an output, each (operator, further inputs: values or arrays)."""
    number = [output.name for output in model.graph.outputs].index(name)
    output = model.graph.outputs[number]
    output.name, value = f"{name} before", output
    for operator, further in operations:
        constants = [
            _constant(model, f"{name} {operator} {place}", each) if isinstance(each, np.ndarray) else each
            for place, each in enumerate(further)
        ]
        node = ir.node(operator, [value, *constants])
        model.graph.append(node)
        value = node.outputs[0]
    value.name, value.shape, value.type = name, output.shape, output.type
    model.graph.outputs[number] = value


def output_scaled(name: str, *numbers: float):
    """The channels of an output are multiplied by these numbers, over and over."""

    def edit(model: ir.Model) -> None:
        output = next(output for output in model.graph.outputs if output.name == name)
        mask = np.resize(np.array(numbers, output.dtype.numpy()), output.shape[1]).reshape(1, -1, 1, 1)
        _after(model, name, ("Mul", [mask]))

    return edit


def output_left_out(name: str):
    """The file has no such output."""

    def edit(model: ir.Model) -> None:
        model.graph.outputs.remove(next(output for output in model.graph.outputs if output.name == name))

    return edit


def outputs_exchanged(one: str, other: str):
    """Each output has the other's name and place."""

    def edit(model: ir.Model) -> None:
        names = [output.name for output in model.graph.outputs]
        first, second = names.index(one), names.index(other)
        values = model.graph.outputs[first], model.graph.outputs[second]
        for value, name in zip(values, (other, one), strict=True):
            value.name = name
        model.graph.outputs[second], model.graph.outputs[first] = values

    return edit


def later_rows_not_a_number(rows: int, name: str):
    """Rows of an output after the first few are NaN."""

    def edit(model: ir.Model) -> None:
        output = next(output for output in model.graph.outputs if output.name == name)
        batch = ir.node("Shape", [output], {"start": 0, "end": 1})
        count = ir.node("Squeeze", [batch.outputs[0]])
        zero, one, most = (_constant(model, f"good row {each}", np.array(each)) for each in (0, 1, rows))
        numbers = ir.node("Range", [zero, count.outputs[0], one])
        late = ir.node("GreaterOrEqual", [numbers.outputs[0], most])
        holes = [_constant(model, f"hole {each}", np.array(each, output.dtype.numpy())) for each in (np.nan, 0)]
        column = ir.node("Reshape", [late.outputs[0], _constant(model, "column", np.array([-1, 1, 1, 1]))])
        hole = ir.node("Where", [column.outputs[0], *holes])
        for node in (batch, count, numbers, late, column, hole):
            model.graph.append(node)
        _after(model, name, ("Add", [hole.outputs[0]]))

    return edit


def tanh_gelu(model: ir.Model) -> None:
    """Every GELU is its approximation by tanh: of z = x / √2, whose erf it needs."""
    linear, cubic = 2 / np.sqrt(np.pi), 0.044715 * 4 / np.sqrt(np.pi)
    for number, erf in enumerate([node for node in model.graph if node.op_type == "Erf"]):
        value, dtype = erf.inputs[0], _dtype(model, "sample")
        factors = [_constant(model, f"gelu {number} {each}", np.array(each, dtype)) for each in (cubic, linear)]
        square = ir.node("Mul", [value, value])
        scaled_square = ir.node("Mul", [square.outputs[0], factors[0]])
        slope = ir.node("Add", [scaled_square.outputs[0], factors[1]])
        inner = ir.node("Mul", [value, slope.outputs[0]])
        tanh = ir.node("Tanh", [inner.outputs[0]])
        for node in (square, scaled_square, slope, inner, tanh):
            model.graph.insert_before(erf, node)
        for user, index in list(erf.outputs[0].uses()):
            user.replace_input_with(index, tanh.outputs[0])
        model.graph.remove(erf, safe=True)


def other_epsilon(operator: str, number: int, epsilon: float):
    """A norm with another epsilon."""

    def edit(model: ir.Model) -> None:
        node = [each for each in model.graph if each.op_type == operator][number]
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)

    return edit


def without_weight_names(model: ir.Model) -> None:
    """Weights have numbers for names, as after an optimiser: which is which cannot be seen."""
    for number, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"w{number}"


def in_bits(bits: int):
    """Weights as whole numbers of so many bits, one scale a tensor, and without their names."""

    def edit(model: ir.Model) -> None:
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            assert tensor is not None
            if len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
                continue
            array = tensor.numpy()
            step = (np.abs(array.astype(np.float64)).max() or 1.0) / (2 ** (bits - 1) - 1)
            coarse = (np.rint(array / step) * step).astype(array.dtype)
            value.const_value = ir.tensor(coarse, name=value.name)
        without_weight_names(model)

    return edit
