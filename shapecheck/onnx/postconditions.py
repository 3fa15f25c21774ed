"""What must hold of an exported graph before it is written: checked without weights, in a fraction of a second."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract, Geometry, Slot
from shapecheck.onnx.shapes import shapes_at
from shapecheck.onnx.trace_graph import bare, modules

REFUSED_BY_TENSORRT = frozenset({
    "SplitToSequence", "SequenceConstruct", "SequenceAt", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceLength",
    "SequenceMap", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement", "StringConcat", "StringSplit",
    "Unique", "Multinomial", "Det", "Bernoulli", "Compress", "MaxUnpool",
})  # fmt: skip
"""Operators that TensorRT's parser rejects."""


_SIZES = ((2, 17, 33), (3, 65, 97), (2, 24, 40), (3, 19, 30))
"""Batch, and height and width in multiples of the divisor: odd and even, none square."""


class ExportError(AssertionError):
    """The exporter made a graph that is not what the contract says: a fault of shapecheck or of a library, not the user's."""


def check(model: ir.Model, contract: Contract) -> None:
    """Raise ExportError where a graph, its parameters still inputs, is not what the contract says.

    Inputs as in the contract; each residual consumed by one add, in the contract's module, at the skip which the contract's
    module makes; valid ONNX, without operators TensorRT rejects; and at several sizes, odd ones included, the shapes the
    contract gives: of the skips and the image, or of what a ControlNet emits.
    """
    _check_inputs(model, contract)
    if contract.role == "unet":
        for slot in contract.residuals:
            _check_add(model, slot)
    refused = sorted({node.op_type for node in model.graph} & REFUSED_BY_TENSORRT)
    _same("operators TensorRT rejects", refused, [])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for batch, height, width in _SIZES:
        geometry = Geometry(batch, contract.divisor * height, contract.divisor * width)
        _check_shapes(model, contract, geometry)


def _check_inputs(model: ir.Model, contract: Contract) -> None:
    declared = {name: tuple(map(str, rule)) for name, rule in contract.input_rules.items()}
    values = model.graph.inputs[: len(declared)]
    found = {str(value.name): tuple(str(getattr(dim, "value", dim)) for dim in value.shape or ()) for value in values}
    _same("inputs", list(found.items()), list(declared.items()))


def _check_add(model: ir.Model, slot: Slot) -> None:
    residual = next(value for value in model.graph.inputs if value.name == slot.name)
    consumers = [(node.op_type, *modules(node)[-1:]) for node in residual.consumers()]
    _same(f"consumers of {slot.name}, and their module", consumers, [("Add", slot.adds[0].owner)])
    (add,) = residual.consumers()
    (skip,) = (value for value in add.inputs if value is not None and value is not residual)
    maker = bare(skip).producer()
    _same(f"{slot.producer} makes the skip of {slot.name}", maker is not None and slot.producer in modules(maker), True)


def _check_shapes(model: ir.Model, contract: Contract, geometry: Geometry) -> None:
    found = shapes_at(model, contract.input_shapes(geometry))
    _same(f"a node that cannot work at {geometry}", found.fault, "")
    if contract.role == "controlnet":
        expected = contract.shapes(geometry)
    else:
        expected = {f"{slot.producer}.out": geometry.shape_of(slot.skip) for slot in contract.residuals}
        image = (geometry.batch, contract.config["out_channels"], geometry.height, geometry.width)
        expected[str(model.graph.outputs[0].name)] = image
    _same(f"shapes at {geometry}", {name: found.known.get(name) for name in expected}, expected)


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ExportError(f"{what}: the graph has {found}, the contract says {expected}")
