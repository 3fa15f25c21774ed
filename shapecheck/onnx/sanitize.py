"""A graph that anybody may have made, made fit to be read: of bounded size, closed, and with names that can be printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.progress import quiet

_MOST_NODES = 200_000
"""More than any UNet has, its functions written out."""


LONGEST_NAME = 500
"""Characters of a name that are kept."""


@contextmanager
def report_unsound(path: Path) -> Iterator[None]:
    """Turn whatever a library raises over a graph into a ShapecheckError: the graph is the user's."""
    try:
        yield
    except Exception as error:
        reason = one_line(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise ShapecheckError(f"{path}: not a sound ONNX graph ({reason}); export or download it again") from None


def convert(path: Path, proto: onnx.ModelProto) -> ir.Model:
    """Return a new sanitized model of the file at `path`. Raises ShapecheckError if the graph is not sound."""
    with report_unsound(path), quiet("onnx_ir"):
        model = ir.from_proto(proto)
        sanitize(model)
    return model


def sanitize(model: ir.Model) -> None:
    """Write functions out, sort the nodes, and rename what could not be shown. Raises ValueError if that cannot be done."""
    nodes = [*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes())]
    if _count_inlined(nodes, model, {}) > _MOST_NODES:  # functions that call functions could never be written out
        raise ValueError(f"its functions come to more than {_MOST_NODES} nodes")
    passes.InlinePass()(model)
    model.graph.sort()
    _refuse_undecoded(model)
    _refuse_unsound(model)
    _make_printable(model)


def _count_inlined(nodes: Iterable[ir.Node], model: ir.Model, sizes: dict[ir.OperatorIdentifier, int]) -> int:
    """Count these nodes with every call replaced by its function; `sizes` keeps what is known of functions."""
    count = 0
    for node in nodes:
        called = node.op_identifier()
        if called in model.functions and called not in sizes:
            sizes[called] = _MOST_NODES  # while it is counted: what calls itself is too large
            sizes[called] = _count_inlined(model.functions[called].all_nodes(), model, sizes)
        count += 1 + sizes.get(called, 0)
    return count


def _refuse_undecoded(model: ir.Model) -> None:
    """Raise ValueError where a text is no UTF-8: protobuf then gives its bytes."""
    texts: list[object] = [model.producer_name, model.producer_version]
    for each in (model, *model.graph):
        texts += [*each.metadata_props, *each.metadata_props.values()]
    for node in model.graph:
        texts += [node.op_type, node.domain, node.name, *(value.name for value in node.outputs)]
    if undecoded := [text for text in texts if isinstance(text, bytes)]:
        raise ValueError(f"{undecoded[0]!r:.60} is no UTF-8 text")


def _refuse_unsound(model: ir.Model) -> None:
    """Raise ValueError where a value comes from nowhere, or a constant's data from a file that a pass might open."""
    made = {*model.graph.inputs, *model.graph.initializers.values(), *(each for node in model.graph for each in node.outputs)}
    for value in (*(each for node in model.graph for each in node.inputs), *model.graph.outputs):
        if value is not None and value not in made:
            raise ValueError(f"nothing makes {value.name}")
    for graph in model.graphs():
        constants = [attribute.value for node in graph for attribute in node.attributes.values()]
        constants += [value.const_value for value in graph.initializers.values() if graph is not model.graph]
        if any(isinstance(constant, ir.ExternalTensor) for constant in constants):
            raise ValueError("a constant keeps its data in another file")


def _make_printable(model: ir.Model) -> None:
    """Rename what could not be shown in one line. Raises ValueError where another value has that name."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    taken = {value.name for value in values}
    for value in values:
        if (name := one_line(value.name or "", LONGEST_NAME)) != (value.name or ""):
            if name in taken:
                raise ValueError(f"two values are called {one_line(name)}")
            taken.add(name)
            value.name = name
