"""Conversion of a graph, which may be hostile, to one that is safe to read: of bounded size, closed, with printable names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.logs import silence_logger

LONGEST_NAME = 500
"""Characters of a name that are kept."""
_MOST_NODES = 200_000
"""More than any UNet has with its functions inlined."""


@contextmanager
def report_unsound(path: Path) -> Iterator[None]:
    """Turn whatever a library raises over a graph into a ShapecheckError: the graph is the user's."""
    try:
        yield
    except Exception as error:
        reason = one_line(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise ShapecheckError(f"{path}: not a sound ONNX graph ({reason}); export or download it again") from None


def convert(path: Path, proto: onnx.ModelProto) -> ir.Model:
    """Return a model of the file at `path` with its functions inlined, its nodes sorted and its names fit to be printed.

    Raises ShapecheckError if the graph is not sound.
    """
    with report_unsound(path), silence_logger("onnx_ir"):
        model = ir.from_proto(proto)
        nodes = [*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes())]
        if _count_inlined(nodes, model, {}) > _MOST_NODES:  # functions that double at every level could never be inlined
            raise ValueError(f"its functions have more than {_MOST_NODES} nodes when inlined")
        passes.InlinePass()(model)
        model.graph.sort()
        _refuse_unsound(model)
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        taken = {value.name for value in values}
        for value in values:
            if (name := one_line(value.name or "", LONGEST_NAME)) != (value.name or ""):
                if name in taken:
                    raise ValueError(f"two values are called {one_line(name)}")
                taken.add(name)
                value.name = name
    return model


def _count_inlined(nodes: Iterable[ir.Node], model: ir.Model, sizes: dict[ir.OperatorIdentifier, int]) -> int:
    """Count these nodes with every call replaced by its function; `sizes` keeps what is known of functions."""
    count = 0
    for node in nodes:
        callee = node.op_identifier()
        if callee in model.functions and callee not in sizes:
            sizes[callee] = _MOST_NODES  # while it is counted: a function that calls itself is too large
            sizes[callee] = _count_inlined(model.functions[callee].all_nodes(), model, sizes)
        count += 1 + sizes.get(callee, 0)
    return count


def _refuse_unsound(model: ir.Model) -> None:
    """Raise ValueError for text that is not UTF-8, a value without a source, or a constant in a file that a pass might open."""
    texts: list[object] = [model.producer_name, model.producer_version]
    for owner in (model, *model.graph):
        texts += [*owner.metadata_props, *owner.metadata_props.values()]
    for node in model.graph:
        texts += [node.op_type, node.domain, node.name, *(value.name for value in node.outputs)]
    if undecoded := [text for text in texts if isinstance(text, bytes)]:  # protobuf returns the bytes if it cannot decode them
        raise ValueError(f"{undecoded[0]!r:.60} is not UTF-8 text")

    computed = {value for node in model.graph for value in node.outputs}
    sources = {*model.graph.inputs, *model.graph.initializers.values(), *computed}
    for value in (*(value for node in model.graph for value in node.inputs), *model.graph.outputs):
        if value is not None and value not in sources:
            raise ValueError(f"no node computes {value.name}")

    for graph in model.graphs():
        constants = [attribute.value for node in graph for attribute in node.attributes.values()]
        constants += [value.const_value for value in graph.initializers.values() if graph is not model.graph]
        if any(isinstance(constant, ir.ExternalTensor) for constant in constants):
            raise ValueError("a constant keeps its data in another file")
