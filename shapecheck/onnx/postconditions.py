"""Postconditions of an exported graph, checked before it is written: without weights, in a fraction of a second."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract, Geometry
from shapecheck.onnx.records import FOLLOWED
from shapecheck.onnx.shapes import infer_shapes_at
from shapecheck.onnx.trace_graph import find_bare_skip, list_modules

REFUSED_BY_TENSORRT = frozenset({
    "SplitToSequence", "SequenceConstruct", "SequenceAt", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceLength",
    "SequenceMap", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "StringConcat", "StringSplit",
    "Unique", "Multinomial", "Det", "Bernoulli", "Compress", "MaxUnpool",
})  # fmt: skip
"""Operators that TensorRT's parser rejects."""


class ExportError(AssertionError):
    """The exporter made a graph that is not what the contract says: a fault of shapecheck or of a library, not the user's."""


def check_graph(model: ir.Model, contract: Contract) -> None:
    """Raise ExportError if a graph, its parameters still inputs, is not what the contract says.

    Inputs as in the contract; each residual consumed by one add, in the contract's module, at the skip which the contract's
    module makes; valid ONNX, without operators TensorRT rejects; and at several sizes, odd ones included, the shapes of the
    contract: of the skips and the image, or of what a ControlNet emits.
    """
    expected = {name: tuple(map(str, rule)) for name, rule in contract.input_rules.items()}
    inputs = {str(value.name): value for value in model.graph.inputs}
    declared = {name: tuple(str(getattr(dim, "value", dim)) for dim in value.shape or ()) for name, value in inputs.items()}
    _require_equal("inputs", list(declared.items())[: len(expected)], list(expected.items()))

    residuals = contract.residuals if contract.role == "unet" else ()
    for slot in residuals:
        residual = inputs[slot.name]
        consumers = [(node.op_type, *list_modules(node)[-1:]) for node in residual.consumers()]
        _require_equal(f"consumers of {slot.name}, and their module", consumers, [("Add", slot.adds[0].owner)])
        (add,) = residual.consumers()
        (skip,) = (value for value in add.inputs if value is not None and value is not residual)
        maker = find_bare_skip(skip).producer()
        is_skip = maker is not None and slot.producer in list_modules(maker)
        _require_equal(f"{slot.producer} makes the skip of {slot.name}", is_skip, True)

    refused = sorted({node.op_type for node in model.graph} & REFUSED_BY_TENSORRT)
    _require_equal("operators TensorRT rejects", refused, [])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)

    for batch, height, width in FOLLOWED:
        geometry = Geometry(batch, contract.divisor * height, contract.divisor * width)
        actual = infer_shapes_at(model, contract.input_shapes(geometry))
        _require_equal(f"a node that cannot work at {geometry}", actual.fault, "")
        shapes = {f"{slot.producer}.out": geometry.shape_of(slot.skip) for slot in residuals} or contract.shapes(geometry)
        if contract.role == "unet":
            image = (geometry.batch, contract.config["out_channels"], geometry.height, geometry.width)
            shapes[str(model.graph.outputs[0].name)] = image
        _require_equal(f"shapes at {geometry}", {name: actual.known.get(name) for name in shapes}, shapes)


def _require_equal(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise ExportError(f"{what}: the graph has {actual}, the contract says {expected}")
