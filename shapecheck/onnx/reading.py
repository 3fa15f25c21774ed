"""What an ONNX graph says of itself, whoever exported it: inputs, outputs, and where each residual is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import torch_name
from shapecheck.onnx import file as onnx_file
from shapecheck.onnx.node_locations import Places, module_in
from shapecheck.onnx.sanitize import LONGEST_NAME, make_sound
from shapecheck.onnx.shapes import Shapes, parameters_to_inputs, shapes_at
from shapecheck.progress import quiet

DeclaredDim = int | str | None
"""A number, a name, or nothing where the file gives neither."""


_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's newer exporter leaves the modules a node comes from, outermost first."""


_SAME_VALUE = ("Cast", "CastLike", "Identity")


_SCALED = ("Mul", "Div")


_SUMS = ("Add", "Sum")


_SIZE_ONLY = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class Landing:
    """One sum that consumes a graph input."""

    skip: str
    """Name of the value the input is added to."""
    module: str
    """Path of the module that produces the skip; empty where no name tells it."""
    rank: int
    """How late the skip is computed: every skip is made from the one before it, so this is the order of the slots."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of the graph as the file declares it."""

    name: str
    dtype: str
    dims: tuple[DeclaredDim, ...] | None
    live: bool = True
    """Whether its values, not only its size, can reach an output."""
    landings: tuple[Landing, ...] = ()
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
    metadata: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    """Without parameters, which some exporters list among the inputs."""
    outputs: tuple[Tensor, ...]
    unknown: tuple[str, ...]
    """Operators onnx does not know, behind which no size can be followed."""
    _model: ir.Model = field(repr=False, compare=False)

    @property
    def image(self) -> Tensor | None:
        """The first output that may be (batch, channels, height, width)."""
        return next((each for each in self.outputs if each.is_image), None)

    def at(self, given: Mapping[str, Sequence[int | None]]) -> Shapes:
        """Every shape where the inputs have these; see `shapes_at`."""
        with _told_of(self.path):
            return shapes_at(self._model, given)

    def places(self, contract: Contract, names: Mapping[str, str]) -> Places:
        """Where nodes and inputs are, in a contract's words; `names` is what the file calls its inputs."""
        return Places(self._model, contract, names)


def read(path: Path) -> Reading:
    """Read an ONNX file, without the weights beside it or in it. Raises ShapecheckError where it is no sound ONNX model."""
    proto = onnx_file.load(path)
    with _told_of(path), quiet("onnx_ir"):
        model = ir.from_proto(proto)
        make_sound(model)
    return _reading(path, model)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """The graph is the user's: whatever a library raises over it is told to the user."""
    try:
        yield
    except Exception as error:
        reason = one_line(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise ShapecheckError(f"{path}: not a sound ONNX graph ({reason}); export or download it again") from None


def _reading(path: Path, model: ir.Model) -> Reading:
    graph = model.graph
    own = [value for value in graph.inputs if not _is_parameter(value)]
    parameters_to_inputs(graph)
    live = _live(graph)
    ranks = {node: rank for rank, node in enumerate(graph)}
    return Reading(
        path,
        one_line(" ".join(filter(None, (model.producer_name, model.producer_version)))),
        dict(model.metadata_props),
        tuple(_tensor(value, live, _landings(value, ranks)) for value in own),
        tuple(_tensor(value, live, ()) for value in graph.outputs),
        tuple(sorted({one_line(node.op_type) for node in graph if not _is_known(node, model)})),
        model,
    )


def _tensor(value: ir.Value, live: frozenset[ir.Value], landings: tuple[Landing, ...]) -> Tensor:
    dtype = value.dtype.name if value.dtype is not None else "unknown"
    dims = None
    if value.shape is not None:
        dims = tuple(map(_dim, value.shape))
    measured = any(node.op_type in _SIZE_ONLY for node in value.consumers())
    return Tensor(_name(value), torch_name(dtype), dims, value in live, landings, measured)


def _dim(dim: int | ir.SymbolicDim) -> DeclaredDim:
    """An axis as declared; some exporters write 0 or -1 where they mean any size."""
    if isinstance(dim, int):
        return dim if dim > 0 else None
    return one_line(dim.value, LONGEST_NAME) if dim.value else None


def _landings(given: ir.Value, ranks: Mapping[ir.Node, int]) -> tuple[Landing, ...]:
    """Every sum of the value, scaled or cast on its way, with something the graph computes."""
    found: list[Landing] = []
    waiting, seen = [given], {given}
    for value in waiting:  # which grows on the way
        for node in value.consumers():
            others = [each for each in node.inputs if each is not None and each is not value]
            if node.op_type in _SAME_VALUE or (node.op_type in _SCALED and all(map(_is_scalar, others))):
                waiting += {*node.outputs[:1]} - seen
                seen |= {*node.outputs[:1]}
            elif node.op_type in _SUMS and len(others) == 1:
                found += _landing(_origin(others[0]), ranks)
    return tuple(found)


def _landing(skip: ir.Value, ranks: Mapping[ir.Node, int]) -> Iterator[Landing]:
    """A sum with this value, where the graph computes it."""
    maker = skip.producer()
    if maker is not None and maker.op_type != "Constant":
        texts = (_name(skip), maker.name or "", maker.metadata_props.get(_SCOPES, ""))
        yield Landing(_name(skip), next(filter(None, map(module_in, texts)), ""), ranks[maker])


def _origin(value: ir.Value) -> ir.Value:
    """The value before casts, which exporters insert between a module and its consumer."""
    while (node := value.producer()) is not None and node.op_type in _SAME_VALUE and node.inputs and node.inputs[0]:
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
        if node.op_type not in _SIZE_ONLY and any(output in found for output in node.outputs):
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
