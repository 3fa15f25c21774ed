"""The reading of an ONNX graph, whoever exported it: inputs, outputs, and where each residual is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract
from shapecheck.contract.errors import one_line
from shapecheck.contract.mismatch import Port
from shapecheck.contract.naming import torch_name
from shapecheck.onnx.node_locations import SCOPES, NodeLocations, find_module
from shapecheck.onnx.sanitize import LONGEST_NAME, report_unsound
from shapecheck.onnx.shapes import Shapes, infer_shapes_at, parameters_to_inputs

SAME_VALUE = ("Cast", "CastLike", "Identity")
SIZE_ONLY = ("Shape", "Size")
"""Operators that read no values."""


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """A sum that a graph input goes into."""

    skip: str
    """Name of the value that the input is added to."""
    module: str
    """Path of the module that produces the skip; empty if no name tells it."""
    rank: int
    """The place of the skip in the order of computation, which is the order of the slots."""


@dataclass(frozen=True, slots=True)
class GraphTensor(Port):
    """An input or output of the graph as the file declares it."""

    dims: tuple[int | str | None, ...] | None = None
    live: bool = True
    """Its values, not only its size, can reach an output."""
    adds: tuple[ResidualAdd, ...] = ()
    measured: bool = False
    """The graph reads sizes off it."""

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    @property
    def is_image(self) -> bool:
        """Return whether it may be (batch, channels, height, width)."""
        return self.is_float and (self.dims is None or len(self.dims) == 4)


@dataclass(frozen=True, slots=True)
class Reading:
    """A graph that was read without any weights."""

    path: Path
    producer: str
    inputs: tuple[GraphTensor, ...]
    """Without parameters, which some exporters list among the inputs."""
    outputs: tuple[GraphTensor, ...]
    unknown: tuple[str, ...]
    """Operators that onnx does not know; no size can be followed through them."""
    _model: ir.Model = field(repr=False, compare=False)

    @property
    def image(self) -> GraphTensor | None:
        """Return the first output that may be (batch, channels, height, width)."""
        return next((tensor for tensor in self.outputs if tensor.is_image), None)

    def at(self, sizes: Mapping[str, Sequence[int | None]]) -> Shapes:
        """Return every shape if the inputs have these; see `infer_shapes_at`."""
        with report_unsound(self.path):
            return infer_shapes_at(self._model, sizes)

    def places(self, contract: Contract, names: Mapping[str, str]) -> NodeLocations:
        """Return where nodes and inputs are, in a contract's words; `names` is what the file calls its inputs."""
        return NodeLocations(self._model, contract, names)


def read_graph(path: Path, model: ir.Model) -> Reading:
    """Read a sanitized model, which belongs to the reading from then on: its weights are taken out."""
    graph = model.graph
    declared = []
    for value in graph.inputs:
        # A parameter has a default, or is named as a module's own and of one fixed shape.
        is_named = (value.name or "").endswith((".weight", ".bias"))
        if not value.is_initializer() and not (is_named and value.shape is not None and value.shape.is_static()):
            declared.append(value)
    parameters_to_inputs(graph)
    ranks = {node: rank for rank, node in enumerate(graph)}
    known = [node for node in graph if onnx.defs.has(node.op_type, node.domain) and node.domain in graph.opset_imports]
    live = _find_live(graph)
    return Reading(
        path,
        one_line(" ".join(filter(None, (model.producer_name, model.producer_version)))),
        tuple(_read_tensor(value, live, ranks) for value in declared),
        tuple(_read_tensor(value, live, {}) for value in graph.outputs),
        tuple(sorted({one_line(node.op_type) for node in {*graph} - {*known}})),
        model,
    )


def _read_tensor(value: ir.Value, live: set[ir.Value], ranks: Mapping[ir.Node, int]) -> GraphTensor:
    dims: list[int | str | None] = []
    for dim in value.shape or ():
        if isinstance(dim, int):
            dims.append(dim if dim > 0 else None)  # some exporters write 0 or -1 for any size
        else:
            dims.append(one_line(dim.value, LONGEST_NAME) if dim.value else None)
    adds = []
    for skip, producer, _ in find_sums(value):
        if producer in ranks:  # not in a branch
            module = find_module(skip.name or "", producer.name or "", producer.metadata_props.get(SCOPES, ""))
            adds.append(ResidualAdd(skip.name or "", module, ranks[producer]))
    return GraphTensor(
        value.name or "",
        torch_name(value.dtype.name if value.dtype is not None else "unknown"),
        None if value.shape is None else tuple(dims),
        value in live,
        tuple(adds),
        any(node.op_type in SIZE_ONLY for node in value.consumers()),
    )


def find_sums(residual: ir.Value) -> Iterator[tuple[ir.Value, ir.Node, ir.Value]]:
    """Yield each skip that a value, scaled or cast on its way, is added to; the node that makes the skip; and the sum."""
    waiting, seen = [residual], {residual}
    for value in waiting:  # which grows on the way
        for node in value.consumers():
            others = [other for other in node.inputs if other is not None and other is not value]
            if node.op_type in SAME_VALUE or (node.op_type in ("Mul", "Div") and all(map(_is_scalar, others))):
                waiting += {*node.outputs[:1]} - seen
                seen |= {*node.outputs[:1]}
            elif node.op_type in ("Add", "Sum") and len(others) == 1 and node.outputs:
                skip = others[0]
                # Exporters insert casts between a module and its consumer.
                producer = skip.producer()
                while producer is not None and producer.op_type in SAME_VALUE and producer.inputs and producer.inputs[0]:
                    skip = producer.inputs[0]
                    producer = skip.producer()
                if producer is not None and producer.op_type != "Constant":
                    yield skip, producer, node.outputs[0]


def _is_scalar(value: ir.Value) -> bool:
    """Return whether a factor is one number, constant or an input: a residual times it is still that residual."""
    producer = value.producer()
    return all(dim == 1 for dim in value.shape) if value.shape is not None else producer is not None and not producer.inputs


def _find_live(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that some output depends on by more than their size."""
    live = set(graph.outputs)
    for node in reversed(graph):
        if node.op_type not in SIZE_ONLY and any(output in live for output in node.outputs):
            nodes = [node]
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    nodes += attribute.as_graph().all_nodes()
            live |= {value for reader in nodes for value in reader.inputs if value is not None}
    return live
