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

from shapecheck.contract import Contract, Dim, Geometry, ShapecheckError, Slot
from shapecheck.contract.dims import BATCH, HEIGHT, WIDTH, constant
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import is_feature
from shapecheck.models.forward_call import added, grouped
from shapecheck.onnx.node_locations import BLOCK, SCOPES
from shapecheck.progress import quiet

OUTPUT = "out_sample"
"""Name of the UNet's output, as optimum and diffusers' own export call it."""


_PREFIX = "model."


class _Fits:
    """A shape that is equal to any."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class _Fitting:
    """A feature of one cell, for the mid block: diffusers adds it there only where its shape is said to be the skip's."""

    shape = _Fits()

    def __init__(self, cell: Tensor) -> None:
        self.cell = cell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*(each.cell if isinstance(each, cls) else each for each in args), **(kwargs or {}))


class _Flat(nn.Module):
    """A model that takes every input by position, in the contract's order."""

    def __init__(self, model: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.model = model
        self._arguments = [each.argument for each in contract.inputs]
        self._slots = len(contract.slots) if contract.role == "unet" else 0
        self._blocks = len(contract.config["down_block_types"])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        call = grouped(dict(zip(self._arguments, tensors, strict=False)))  # what is added is left over
        given = tensors[len(self._arguments) :]
        residuals, features = given[: self._slots], given[self._slots :]
        call |= added(residuals, [*features[: self._blocks], *map(_Fitting, features[self._blocks :])])
        result = self.model(**call, return_dict=False)
        return (*result[0], result[1]) if isinstance(result[0], list) else (result[0],)


def trace_unet(model: nn.Module, contract: Contract, opset: int) -> ir.Model:
    """The graph of a UNet on the meta device: the contract's inputs, one input a slot and a feature; one output.

    The model's parameters are graph inputs too, after the others, under their state-dict names: no pass can fold them.
    """
    # a residual of one cell broadcasts over its skip: the graph reads no size off it, and its add is that of any size
    element = next(model.parameters()).dtype
    residuals = [torch.empty((1, slot.channels, 1, 1), device="meta", dtype=element) for slot in contract.residuals]
    graph = _trace(model, contract, residuals, opset)
    rules = contract.input_rules
    for value, (name, shape) in zip(graph.graph.inputs[: len(rules)], rules.items(), strict=True):
        value.name, value.shape = name, _symbolic(shape)
    (output,) = graph.graph.outputs
    _name_outputs(graph)
    for slot in (*contract.features, *contract.slots):
        _name_slot(graph, slot)
    output.name = OUTPUT
    output.shape = _symbolic((BATCH, constant(contract.config["out_channels"]), HEIGHT, WIDTH))
    return graph


def trace_controlnet(model: nn.Module, contract: Contract, opset: int) -> ir.Model:
    """The graph of a ControlNet on the meta device: its inputs, conditioning_scale among them, and one output a slot."""
    graph = _trace(model, contract, [], opset)
    for value, each in zip(graph.graph.inputs[: len(contract.inputs)], contract.inputs, strict=True):
        value.name, value.shape = each.name, _symbolic(each.shape)
    for value, slot in zip(graph.graph.outputs, contract.slots, strict=True):
        value.name, value.shape = slot.name, _symbolic(slot.shape)
    return graph


def modules(node: ir.Node) -> list[str]:
    """The paths of the modules a node was traced in, outermost first; the model itself is the empty path."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return [str(scope).removeprefix(_PREFIX.rstrip(".")).removeprefix(".") for scope in scopes[1:-1]]


def bare(skip: ir.Value) -> ir.Value:
    """The skip before a T2I-Adapter's feature was added to it."""
    maker = skip.producer()
    added_to = [value for value in maker.inputs if value is not None] if maker is not None and maker.op_type == "Add" else []
    if not any(value.is_graph_input() and is_feature(str(value.name)) for value in added_to):
        return skip
    return next(value for value in added_to if not value.is_graph_input())


def drop_traces(model: ir.Model) -> None:
    """Drop what tells of the exporting machine: stack traces with its paths. `modules` knows nothing afterwards."""
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    model.graph.name = "shapecheck"


def _trace(model: nn.Module, contract: Contract, residuals: list[Tensor], opset: int) -> ir.Model:
    geometry = _odd_geometry(contract)
    tensors, dynamic = [], []
    for given in contract.inputs:
        tensors.append(torch.empty(given.shape_at(geometry), device="meta", dtype=getattr(torch, given.dtype)))
        dynamic.append({axis: torch.export.Dim.AUTO for axis, dim in enumerate(given.shape) if dim.symbol is not None})
    dynamic += [{} for _ in residuals]
    graph = _exported(_Flat(model, contract), (*tensors, *residuals), dynamic, opset)
    _keep_scopes(graph)
    _parameters_to_inputs(graph)
    _promote(graph)
    _simplify(graph)
    return graph


def _exported(model: nn.Module, tensors: tuple[Tensor, ...], dynamic: list[dict[int, Any]], opset: int) -> ir.Model:
    try:
        with quiet("torch.onnx"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the exporter on its own internals
            program = torch.export.export(model, tensors, dynamic_shapes=(tuple(dynamic),), strict=False)
            exported = torch.onnx.export(
                program, (), dynamo=True, optimize=False, external_data=False, opset_version=opset, verbose=False
            )
    except Exception as error:  # the model's forward is the user's: whatever the exporter makes of it is told to the user
        reason = one_line(f"{type(error).__name__}: {str(error).strip()}", longest=600)
        raise ShapecheckError(f"PyTorch's exporter cannot trace this model: {reason}") from error
    assert exported is not None
    return exported.model


def _odd_geometry(contract: Contract) -> Geometry:
    """Where to trace: sizes at which no branch for convenient sizes is taken, and no two axes are alike."""
    halvings = max((len(dim.halvings) for slot in contract.residuals for dim in slot.skip), default=3)
    smallest = max(3, 2 ** max(1, halvings + 1) // contract.divisor) | 1
    return Geometry(2, contract.divisor * smallest, contract.divisor * (smallest + 8))


def _keep_scopes(model: ir.Model) -> None:
    """Drop the stack traces: they outweigh the graph, and every check of it would copy them."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph:
            scopes = node.metadata_props.get(SCOPES)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[SCOPES] = scopes


def _parameters_to_inputs(model: ir.Model) -> None:
    """Let the passes see parameters as unknown values: constant folding would write transposed copies of them."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(_PREFIX):
            del model.graph.initializers[name]
            value.const_value = None
            value.name = name.removeprefix(_PREFIX)
            model.graph.inputs.append(value)


def _promote(model: ir.Model) -> None:
    """Cast what a Concat joins to the widest of its types, as PyTorch does and its exporter forgets.

    SDXL in half precision joins text_embeds with an embedding of time_ids that diffusers computes in float32.
    """
    for node in list(model.graph.all_nodes()):
        dtypes = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
        if node.op_type != "Concat" or len(dtypes) < 2:
            continue
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        for at, value in enumerate(node.inputs):
            if value is not None and value.dtype != widest:
                cast = ir.node("Cast", [value], {"to": int(widest)})
                cast.metadata_props.update(node.metadata_props)
                node.graph.insert_before(node, cast)  # type: ignore[union-attr]
                node.replace_input_with(at, cast.outputs[0])
        node.outputs[0].dtype = widest


def _simplify(model: ir.Model) -> None:
    """Fold what is constant and share what is equal; the rewriter's other rules take a minute and gain nothing here."""
    passes.InlinePass()(model)
    # Never fold a transposed weight into a copy of it.
    should_fold = lambda node: False if node.op_type == "Transpose" else None  # noqa: E731
    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _symbolic(shape: tuple[Dim, ...]) -> ir.Shape:
    return ir.Shape([dim.scale if dim.symbol is None else str(dim) for dim in shape])


def _name_slot(model: ir.Model, slot: Slot) -> None:
    residual = next(value for value in model.graph.inputs if value.name == slot.name)
    (add,) = residual.consumers()
    skip = next(value for value in add.inputs if value is not None and value is not residual)
    if bare(skip) is skip:
        skip.name = f"{slot.producer}.out"  # KOALA's mid slot shares its skip with the slot before
    add.outputs[0].name = f"{slot.producer}.out+{slot.name}"


def _name_outputs(model: ir.Model) -> None:
    """What conv_in, the parts of down blocks, the mid block and the up blocks give: the last value traced in each."""
    last: dict[str, ir.Value] = {}
    for node in model.graph:
        last |= {module: node.outputs[0] for module in modules(node) if BLOCK.fullmatch(module)}
    for module, value in last.items():
        value.name = f"{module}.out"
