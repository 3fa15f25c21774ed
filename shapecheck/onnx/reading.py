"""The reading of an ONNX graph, whoever exported it: inputs, outputs, and where each residual is added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract
from shapecheck.contract.errors import one_line
from shapecheck.contract.mismatch import Port
from shapecheck.contract.naming import torch_name
from shapecheck.onnx.fused_operators import can_be_followed
from shapecheck.onnx.node_locations import SCOPES, NodeLocations, find_module
from shapecheck.onnx.sanitize import LONGEST_NAME, report_unsound
from shapecheck.onnx.shapes import Shapes, infer_shapes_at, parameters_to_inputs
from shapecheck.onnx.sums import SIZE_ONLY, Sum, find_obstacles, find_sums, is_measured, read_factor

_IMAGES = ("out_sample", "sample", "noise_pred", "sample_out", "latent")
"""Usual names of a UNet's output."""


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """A sum that a graph input goes into."""

    skip: str
    """Name of the value that the input is added to."""
    module: str
    """Path of the module that produces the skip; empty if no name tells it."""
    rank: int
    """The place of the skip in the order of computation."""
    depth: int = 0
    """The number of skips that it is computed from, which shows the order of the slots if none is computed twice."""
    factor: float = 1.0
    """What the input is multiplied by: negative if it is subtracted; not a number if that is no constant."""


@dataclass(frozen=True, slots=True)
class GraphTensor(Port):
    """An input or output of the graph as the file declares it."""

    dims: tuple[int | str | None, ...] | None = None
    live: bool = True
    """Its values, not only its size, can reach an output."""
    adds: tuple[ResidualAdd, ...] = ()
    measured: bool = False
    """The graph reads sizes off it."""
    factor: float | None = None
    """The constant that an output is multiplied by last."""
    obstacles: tuple[str, ...] = ()
    """The operators that an input without a known sum goes through."""
    taken_as: str = ""
    """The type that an input is converted to before anything is computed with it; empty for its own."""

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
        """Return the output that is the image: by name, else the first as large as the latents, else the first of its rank."""
        images = [tensor for tensor in self.outputs if tensor.is_image]
        latents = next((tensor for tensor in self.inputs if tensor.is_image and tensor.dims), None)
        named = [tensor for tensor in images if tensor.name in _IMAGES]
        large = [tensor for tensor in images if latents and tensor.dims and tensor.dims[2:] == (latents.dims or ())[2:]]
        return next(iter((*named, *large, *images)), None)

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
    ranks = {node: rank for rank, node in enumerate(graph)}
    # While it shows what is constant. A sum may be computed once for each of its readers.
    found = {value: {addition.producer: addition for addition in find_sums(value, ranks)} for value in declared}
    sums = {value: tuple(additions.values()) for value, additions in found.items()}
    factors = {value: read_factor(value) for value in graph.outputs}
    casts = {value: _find_cast(value) for value in declared}
    obstacles = {value: () if sums[value] else find_obstacles(value) for value in declared}
    parameters_to_inputs(graph)
    depths = _count_depths(graph, {addition.producer for additions in sums.values() for addition in additions})
    known = [node for node in graph if onnx.defs.has(node.op_type, node.domain) and node.domain in graph.opset_imports]
    live = _find_live(graph)

    def describe_sum(addition: Sum) -> ResidualAdd:
        skip, producer = addition.skip.name or "", addition.producer
        module = find_module(skip, producer.name or "", producer.metadata_props.get(SCOPES, ""))
        return ResidualAdd(skip, module, ranks[producer], depths[producer], addition.factor)

    return Reading(
        path,
        one_line(" ".join(filter(None, (model.producer_name, model.producer_version)))),
        tuple(
            replace(
                _read_tensor(value, live, map(describe_sum, sums[value])),
                obstacles=tuple(map(one_line, obstacles[value])),
                taken_as=casts[value],
            )
            for value in declared
        ),
        tuple(replace(_read_tensor(value, live), factor=factors[value]) for value in graph.outputs),
        tuple(sorted({one_line(node.op_type) for node in {*graph} - {*known} if not can_be_followed(node)})),
        model,
    )


def _read_tensor(value: ir.Value, live: set[ir.Value], adds: Iterable[ResidualAdd] = ()) -> GraphTensor:
    dims: list[int | str | None] = []
    for dim in value.shape or ():
        if isinstance(dim, int):
            dims.append(dim if dim > 0 else None)  # some exporters write 0 or -1 for any size
        else:
            dims.append(one_line(dim.value, LONGEST_NAME) if dim.value else None)
    return GraphTensor(
        value.name or "",
        torch_name(value.dtype.name if value.dtype is not None else "unknown"),
        None if value.shape is None else tuple(dims),
        value in live,
        tuple(adds),
        is_measured(value),
    )


def _find_cast(value: ir.Value) -> str:
    """Return the type that all readers of a value convert it to; empty if there is none."""
    types = {node.attributes["to"].as_int() if node.op_type == "Cast" else 0 for node in value.consumers()}
    return torch_name(ir.DataType(types.pop()).name) if len(types) == 1 and types != {0} else ""


def _count_depths(graph: ir.Graph, producers: set[ir.Node]) -> dict[ir.Node, int]:
    """Return for each of these nodes how many of them its result is computed from, itself included."""
    bits = {node: 1 << number for number, node in enumerate(producers)}
    sources: dict[ir.Value, int] = {}
    for node in graph:
        found = bits.get(node, 0)
        for value in node.inputs:
            found |= sources.get(value, 0) if value is not None else 0
        sources |= dict.fromkeys(node.outputs, found) if found else {}
    return {node: sources[node.outputs[0]].bit_count() for node in producers}


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
