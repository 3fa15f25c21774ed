"""What an ONNX graph says of itself, whoever exported it: inputs, outputs, and where each residual is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import torch_name
from shapecheck.onnx.node_locations import SCOPES, Places, module_in
from shapecheck.onnx.sanitize import LONGEST_NAME, report_unsound
from shapecheck.onnx.shapes import Shapes, parameters_to_inputs, shapes_at

DeclaredDim = int | str | None
"""A number, a name, or nothing where the file gives neither."""


SAME_VALUE = ("Cast", "CastLike", "Identity")


_SCALED = ("Mul", "Div")


_SUMS = ("Add", "Sum")


SIZE_ONLY = ("Shape", "Size")
"""Operators that read no values."""


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """One sum that consumes a graph input."""

    skip: str
    """Name of the value the input is added to."""
    module: str
    """Path of the module that produces the skip; empty where no name tells it."""
    rank: int
    """How late the skip is computed: every skip is made from the one before it, so this is the order of the slots."""


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """An input or output of the graph as the file declares it."""

    name: str
    dtype: str
    dims: tuple[DeclaredDim, ...] | None
    live: bool = True
    """Whether its values, not only its size, can reach an output."""
    adds: tuple[ResidualAdd, ...] = ()
    measured: bool = False
    """Whether the graph reads sizes off it."""

    @property
    def is_float(self) -> bool:
        """Whether it holds floating point numbers."""
        return "float" in self.dtype

    @property
    def is_image(self) -> bool:
        """Whether it may be (batch, channels, height, width)."""
        return self.is_float and (self.dims is None or len(self.dims) == 4)

    @property
    def rule(self) -> str:
        """The declared shape in words, `?` where an axis has neither number nor name."""
        return "no shape" if self.dims is None else "×".join("?" if dim is None else str(dim) for dim in self.dims) or "scalar"


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, without any weights."""

    path: Path
    producer: str
    inputs: tuple[GraphTensor, ...]
    """Without parameters, which some exporters list among the inputs."""
    outputs: tuple[GraphTensor, ...]
    unknown: tuple[str, ...]
    """Operators onnx does not know, behind which no size can be followed."""
    _model: ir.Model = field(repr=False, compare=False)

    @property
    def image(self) -> GraphTensor | None:
        """The first output that may be (batch, channels, height, width)."""
        return next((each for each in self.outputs if each.is_image), None)

    def at(self, given: Mapping[str, Sequence[int | None]]) -> Shapes:
        """Every shape where the inputs have these; see `shapes_at`."""
        with report_unsound(self.path):
            return shapes_at(self._model, given)

    def places(self, contract: Contract, names: Mapping[str, str]) -> Places:
        """Where nodes and inputs are, in a contract's words; `names` is what the file calls its inputs."""
        return Places(self._model, contract, names)


def read_graph(path: Path, model: ir.Model) -> Reading:
    """Read a sanitized model, which is the reading's own from then on: its weights are taken out."""
    graph = model.graph
    declared = [value for value in graph.inputs if not _is_parameter(value)]
    parameters_to_inputs(graph)
    live = _live(graph)
    ranks = {node: rank for rank, node in enumerate(graph)}
    return Reading(
        path,
        one_line(" ".join(filter(None, (model.producer_name, model.producer_version)))),
        tuple(_tensor(value, live, _find_adds(value, ranks)) for value in declared),
        tuple(_tensor(value, live, ()) for value in graph.outputs),
        tuple(sorted({one_line(node.op_type) for node in graph if not _is_known(node, model)})),
        model,
    )


def _tensor(value: ir.Value, live: frozenset[ir.Value], adds: tuple[ResidualAdd, ...]) -> GraphTensor:
    dtype = value.dtype.name if value.dtype is not None else "unknown"
    dims = None
    if value.shape is not None:
        dims = tuple(map(_dim, value.shape))
    measured = any(node.op_type in SIZE_ONLY for node in value.consumers())
    return GraphTensor(_name(value), torch_name(dtype), dims, value in live, adds, measured)


def _dim(dim: int | ir.SymbolicDim) -> DeclaredDim:
    """An axis as declared; some exporters write 0 or -1 where they mean any size."""
    if isinstance(dim, int):
        return dim if dim > 0 else None
    return one_line(dim.value, LONGEST_NAME) if dim.value else None


def _find_adds(residual: ir.Value, ranks: Mapping[ir.Node, int]) -> tuple[ResidualAdd, ...]:
    found = []
    for skip, maker, _ in find_sums(residual):
        texts = (_name(skip), maker.name or "", maker.metadata_props.get(SCOPES, ""))
        found.append(ResidualAdd(_name(skip), next(filter(None, map(module_in, texts)), ""), ranks[maker]))
    return tuple(found)


def find_sums(residual: ir.Value) -> Iterator[tuple[ir.Value, ir.Node, ir.Value]]:
    """Yield each skip that a value, scaled or cast on its way, is added to; the node that makes the skip; and the sum."""
    waiting, seen = [residual], {residual}
    for value in waiting:  # which grows on the way
        for node in value.consumers():
            others = [other for other in node.inputs if other is not None and other is not value]
            if node.op_type in SAME_VALUE or (node.op_type in _SCALED and all(map(_is_scalar, others))):
                waiting += {*node.outputs[:1]} - seen
                seen |= {*node.outputs[:1]}
            elif node.op_type in _SUMS and len(others) == 1:
                skip = _origin(others[0])
                maker = skip.producer()
                if maker is not None and maker.op_type != "Constant":
                    yield skip, maker, node.outputs[0]


def _origin(value: ir.Value) -> ir.Value:
    """The value before casts, which exporters insert between a module and its consumer."""
    while (node := value.producer()) is not None and node.op_type in SAME_VALUE and node.inputs and node.inputs[0]:
        value = node.inputs[0]
    return value


def _is_scalar(value: ir.Value) -> bool:
    """Whether a factor is one number, constant or given: a residual times it is still that residual."""
    producer = value.producer()
    return all(dim == 1 for dim in value.shape) if value.shape is not None else producer is not None and not producer.inputs


def _live(graph: ir.Graph) -> frozenset[ir.Value]:
    """The values some output depends on by more than their size."""
    found = set(graph.outputs)
    for node in reversed(graph):
        if node.op_type not in SIZE_ONLY and any(output in found for output in node.outputs):
            inner = [each for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH
                     for each in attribute.as_graph().all_nodes()]  # fmt: skip
            found |= {value for each in (node, *inner) for value in each.inputs if value is not None}
    return frozenset(found)


def _is_parameter(value: ir.Value) -> bool:
    """Whether a graph input is a weight: given a default, or named as a module's own and of one fixed shape."""
    fixed = value.shape is not None and value.shape.is_static()
    return value.is_initializer() or (fixed and _name(value).endswith((".weight", ".bias")))


def _is_known(node: ir.Node, model: ir.Model) -> bool:
    return onnx.defs.has(node.op_type, node.domain) and node.domain in model.graph.opset_imports


def _name(value: ir.Value) -> str:
    return value.name or ""
