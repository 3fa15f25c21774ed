"""A UNet or ControlNet as an ONNX graph without weights: traced on the meta device at odd sizes, right at every size."""

from __future__ import annotations

import ast
import warnings
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.dims import BATCH, HEIGHT, WIDTH, constant
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import is_feature
from shapecheck.logs import silence_logger
from shapecheck.models.forward_call import build_residual_arguments, group_arguments
from shapecheck.observe.residual_tracer import find_tensors
from shapecheck.onnx.node_locations import BLOCK, SCOPES

OUTPUT = "out_sample"
"""Name of the UNet's output, as optimum and diffusers' own export call it."""


class _AnyShape:
    """A shape that is equal to any."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class _MidFeature:
    """A feature of one cell for the mid block: diffusers adds it there only if its shape is equal to the skip's."""

    shape = _AnyShape()

    def __init__(self, cell: Tensor) -> None:
        self.cell = cell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*(arg.cell if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


class _FlatModel(nn.Module):
    """A model that takes every input by position, in the contract's order."""

    def __init__(self, model: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.model = model
        self._arguments = [base.argument for base in contract.inputs]
        self._slots = len(contract.slots) if contract.role == "unet" else 0
        self._blocks = len(contract.config["down_block_types"])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        call = group_arguments(dict(zip(self._arguments, tensors, strict=False)))
        others = tensors[len(self._arguments) :]
        residuals, features = others[: self._slots], others[self._slots :]
        call |= build_residual_arguments(residuals, [*features[: self._blocks], *map(_MidFeature, features[self._blocks :])])
        result = self.model(**call, return_dict=False)
        if extra := len(list(find_tensors(result[2 if isinstance(result[0], list) else 1 :]))):
            raise ShapecheckError(
                f"{type(self.model).__name__}.forward returns {extra} more tensors than diffusers' own, such as caches, and a "
                "file of it would not: export it as diffusers has it"
            )
        return (*result[0], result[1]) if isinstance(result[0], list) else (result[0],)


def trace(model: nn.Module, contract: Contract, opset: int) -> ir.Model:
    """Return the graph of a model on the meta device: the contract's inputs, and what it returns, under the contract's names.

    A UNet has one input a slot and a feature, and one output; a ControlNet has conditioning_scale among its inputs, and one
    output a slot. The parameters are graph inputs too, after the others, under their state-dict names: no pass can fold them.
    Raises ShapecheckError if PyTorch's exporter cannot trace the model.
    """
    # At these sizes no branch for convenient sizes is taken, and no two axes are alike.
    halvings = max((len(dim.halvings) for slot in contract.residuals for dim in slot.skip), default=3)
    smallest = max(3, 2 ** max(1, halvings + 1) // contract.divisor) | 1
    geometry = Geometry(2, contract.divisor * smallest, contract.divisor * (smallest + 8))
    tensors, dynamic = [], []
    for base in contract.inputs:
        tensors.append(torch.empty(base.shape_at(geometry), device="meta", dtype=getattr(torch, base.dtype)))
        dynamic.append({axis: torch.export.Dim.AUTO for axis, dim in enumerate(base.shape) if dim.symbol is not None})
    # A residual of one cell broadcasts over its skip: the graph reads no size off it, and its add is that of any size.
    for slot in contract.residuals if contract.role == "unet" else ():
        tensors.append(torch.empty((1, slot.channels, 1, 1), device="meta", dtype=next(model.parameters()).dtype))
        dynamic.append({})
    graph = _export(_FlatModel(model, contract), tuple(tensors), dynamic, opset)
    _promote(graph)

    # Fold what is constant and share what is equal; the rewriter's other rules take a minute and gain nothing here.
    passes.InlinePass()(graph)
    # Never fold a transposed weight into a copy of it.
    should_fold = lambda node: False if node.op_type == "Transpose" else None  # noqa: E731
    optimizer.fold_constants(graph, onnx_shape_inference=True, should_fold=should_fold)
    passes.CommonSubexpressionEliminationPass()(graph)
    passes.RemoveUnusedNodesPass()(graph)

    rules, outputs = contract.input_rules, {slot.name: slot.shape for slot in contract.slots}
    if contract.role == "unet":
        outputs = {OUTPUT: (BATCH, constant(contract.config["out_channels"]), HEIGHT, WIDTH)}
    values = (*graph.graph.inputs[: len(rules)], *graph.graph.outputs)
    for value, (name, rule) in zip(values, (*rules.items(), *outputs.items()), strict=True):
        value.name = name
        value.shape = ir.Shape([dim.scale if dim.symbol is None else str(dim) for dim in rule])
    if contract.role == "unet":
        _name_values(graph, contract)
    return graph


def list_modules(node: ir.Node) -> list[str]:
    """Return the paths of the modules a node was traced in, outermost first; the model itself is the empty path."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return [str(scope).removeprefix("model").removeprefix(".") for scope in scopes[1:-1]]


def find_bare_skip(skip: ir.Value) -> ir.Value:
    """Return the skip before a T2I-Adapter's feature was added to it."""
    maker = skip.producer()
    terms = [value for value in maker.inputs if value is not None] if maker is not None and maker.op_type == "Add" else []
    if not any(value.is_graph_input() and is_feature(str(value.name)) for value in terms):
        return skip
    return next(value for value in terms if not value.is_graph_input())


def _export(model: nn.Module, tensors: tuple[Tensor, ...], dynamic: list[dict[int, Any]], opset: int) -> ir.Model:
    try:
        with silence_logger("torch.onnx"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the exporter on its own internals
            program = torch.export.export(model, tensors, dynamic_shapes=(tuple(dynamic),), strict=False)
            exported = torch.onnx.export(
                program, (), dynamo=True, optimize=False, external_data=False, opset_version=opset, verbose=False
            )
    except ShapecheckError:
        raise
    except Exception as error:  # the model's forward is the user's
        reason = one_line(f"{type(error).__name__}: {str(error).strip()}", longest=600)
        raise ShapecheckError(f"PyTorch's exporter cannot trace this model: {reason}") from error
    assert exported is not None
    graph = exported.model
    # Stack traces outweigh the graph, and every check of it would copy them.
    for nodes in (graph.graph, *graph.functions.values()):
        for node in nodes:
            scopes = node.metadata_props.get(SCOPES)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[SCOPES] = scopes
    # Constant folding would write transposed copies of parameters that it knows.
    for name, value in list(graph.graph.initializers.items()):
        if name.startswith("model."):
            del graph.graph.initializers[name]
            value.const_value = None
            value.name = name.removeprefix("model.")
            graph.graph.inputs.append(value)
    return graph


def _promote(model: ir.Model) -> None:
    """Cast what a Concat joins to the widest of its types, as PyTorch does and its exporter forgets.

    SDXL in half precision joins text_embeds with an embedding of time_ids that diffusers computes in float32.
    """
    for node in list(model.graph.all_nodes()):
        dtypes = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
        if node.op_type != "Concat" or len(dtypes) < 2:
            continue
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype != widest:
                cast = ir.node("Cast", [value], {"to": int(widest)})
                cast.metadata_props.update(node.metadata_props)
                node.graph.insert_before(node, cast)  # type: ignore[union-attr]
                node.replace_input_with(index, cast.outputs[0])
        node.outputs[0].dtype = widest


def _name_values(model: ir.Model, contract: Contract) -> None:
    """Name what blocks return, the last value traced in each, after their modules; skips and sums after their slots."""
    outputs: dict[str, ir.Value] = {}
    for node in model.graph:
        outputs |= {module: node.outputs[0] for module in list_modules(node) if BLOCK.fullmatch(module)}
    for module, value in outputs.items():
        value.name = f"{module}.out"
    inputs = {value.name: value for value in model.graph.inputs}
    for slot in (*contract.features, *contract.slots):
        (add,) = inputs[slot.name].consumers()
        skip = next(value for value in add.inputs if value is not None and value is not inputs[slot.name])
        if find_bare_skip(skip) is skip:
            skip.name = f"{slot.producer}.out"  # KOALA's mid slot shares its skip with the slot before
        add.outputs[0].name = f"{slot.producer}.out+{slot.name}"
