"""Healthy ONNX files as other people export them: a table of kinds, each one export and the edits made to it.

Every file computes what its model does, at the sizes that it takes; only it is written otherwise than ours. Many kinds derive
from one export, which is made once a run.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import foreign_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from artefacts import make_once
from diffusers import ControlNetModel
from onnx_files import Flat, FlatControlNet
from small import SHALLOW, TEXT_TIME, controlnet, unet
from torch import nn
from torch.export import Dim

from shapecheck import Contract, Geometry, probe
from shapecheck.contract.naming import find_scheme
from shapecheck.logs import silence_logger
from shapecheck.observe.probe import probe_controlnet
from shapecheck.observe.subject import copy_to_meta

Edit = Callable[[ir.Model], ir.Model | None]
"""Changes a model in place, or returns another."""

MODELS: Mapping[str, dict[str, Any]] = {
    "sd": SHALLOW,
    "deep": {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    },
    "xl": {**SHALLOW, **TEXT_TIME, "use_linear_projection": True},
    "lcm": {**SHALLOW, "time_cond_proj_dim": 6},
    "inpaint": {**SHALLOW, "in_channels": 9, "out_channels": 4},
    "labels": {**SHALLOW, "in_channels": 7, "out_channels": 4, "num_class_embeds": 10},
}
"""Five slots on two levels, nine on four, and five with SDXL's inputs. All have text."""


@dataclass(frozen=True)
class Export:
    """A call of one of PyTorch's exporters."""

    model: str = "sd"
    exporter: str = "torchscript"
    opset: int = 17
    latent: tuple[int, int] = (17, 25)
    batch: int = 2
    dims: str = "contract"
    """The sizes that stay open: all, under the contract's names; all but the `batch`; `none`; torch's `AUTO` or `DYNAMIC`."""
    folding: bool = True
    strength: float | None = None
    """Of a ControlNet that takes none, or that is inside."""
    dtype: str = "float32"
    inside: bool = False
    """A UNet that holds its ControlNet."""
    timestep: str = ""
    """Its type if that is another, and `scalar` or `one` if it is one number for all rows."""


@dataclass(frozen=True)
class Kind:
    """A kind of healthy file."""

    export: Export = field(default_factory=Export)
    edits: tuple[Edit, ...] = ()
    divisor: int = 1
    """It works at multiples of this."""
    fixed: tuple[str, ...] = ()
    """Sizes that it fixes."""

    @property
    def is_controlnet(self) -> bool:
        return self.export.model == "controlnet"


_CLOSED = {
    "none": ("batch", "h", "w", "tokens"),
    "batch": ("batch",),
    "tokens": ("tokens",),
    "w": ("w",),
    "batch, tokens": ("batch", "tokens"),
}


@cache
def make_model(name: str) -> nn.Module:
    if name == "controlnet":
        net = controlnet(unet(**MODELS["sd"]))
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.1)
        return net
    return unet(**MODELS[name])


@cache
def observe(name: str) -> Contract:
    model = make_model(name)
    return probe_controlnet(copy_to_meta(model)) if isinstance(model, ControlNetModel) else probe(copy_to_meta(model))


class _Inside(nn.Module):
    """A UNet that takes an image, and makes its residuals itself."""

    def __init__(self, strength: float | None) -> None:
        super().__init__()
        self.unet, self.controlnet, self.strength = make_model("sd"), make_model("controlnet"), strength

    def forward(self, sample: Any, timestep: Any, text: Any, image: Any, strength: Any = None) -> Any:
        downs, mid = self.controlnet(sample, timestep, text, image, return_dict=False)
        strength = self.strength if strength is None else strength
        return self.unet(
            sample,
            timestep,
            text,
            down_block_additional_residuals=[down * strength for down in downs],
            mid_block_additional_residual=mid * strength,
            return_dict=False,
        )[0]


class _Emitting(FlatControlNet):
    """A ControlNet, at one strength if that is given."""

    def __init__(self, model: nn.Module, contract: Contract, strength: float | None) -> None:
        super().__init__(model, contract)
        self.strength = strength

    def forward(self, *given: Any) -> tuple[torch.Tensor, ...]:
        return super().forward(*given) if self.strength is None else super().forward(*given, self.strength)


def _export(path: Path, export: Export) -> None:
    contract, module, outputs = observe(export.model), make_model(export.model), ["out_sample"]
    if export.dtype != "float32":
        module = copy.deepcopy(module).to(getattr(torch, export.dtype))
    rules = {value.name: value.shape for value in (*contract.inputs, *contract.slots)}
    geometry = Geometry(export.batch, *export.latent, 7)
    shapes = dict(contract.input_shapes(geometry))
    if export.inside:
        module, net = _Inside(export.strength), observe("controlnet")
        shapes = {name: shapes[name] for name in ("sample", "timestep", "encoder_hidden_states")}
        shapes["controlnet_cond"] = net.input_shapes(geometry)["controlnet_cond"]
        rules["controlnet_cond"] = dict(net.input_rules)["controlnet_cond"]
        if export.strength is None:
            shapes["conditioning_scale"], rules["conditioning_scale"] = (), ()
    elif export.model == "controlnet":
        outputs = [slot.name for slot in contract.slots]
        module = _Emitting(module, contract, export.strength)
        if export.strength is not None:
            del shapes["conditioning_scale"]
    else:
        module = Flat(module, contract, {})
    form = export.timestep.split()
    if {*form} & {"scalar", "one"}:
        shapes["timestep"] = rules["timestep"] = (1,) * ("one" in form)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, export.dtype)
    tensors = {name: torch.rand(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    named = [word for word in form if word not in ("scalar", "one")]
    whole = {"class_labels": "int64", **dict.fromkeys(["timestep"] if named else [], "".join(named))}
    tensors |= {name: (tensors[name] * 9).to(getattr(torch, word)) for name, word in whole.items() if name in tensors}
    closed = _CLOSED.get(export.dims, ())
    axes = {
        name: {
            axis: str(dim)
            for axis, dim in enumerate(rules[name])
            if not isinstance(dim, int) and dim.symbol and dim.symbol not in closed
        }
        for name in (*tensors, *outputs)
        if name in rules
    }
    if "out_sample" in outputs:
        axes["out_sample"] = axes["sample"]
    named = {"input_names": list(tensors), "output_names": outputs, "opset_version": export.opset}
    with warnings.catch_warnings(), silence_logger("torch.onnx"):
        warnings.simplefilter("ignore")
        if export.exporter == "torchscript":
            options = {"dynamic_axes": axes, "do_constant_folding": export.folding, "dynamo": False}
            torch.onnx.export(module.eval(), tuple(tensors.values()), str(path), **named, **options)
            return
        hint = getattr(Dim, export.dims, None)
        dynamic = (tuple(dict.fromkeys(axes[name], hint) for name in tensors),) if hint is not None else None
        program = torch.export.export(module.eval(), tuple(tensors.values()), dynamic_shapes=dynamic, strict=False)
        torch.onnx.export(program, (), str(path), **named, dynamo=True, external_data=False, verbose=False)


def make_file(path: Path, name: str) -> Path:
    """Write the file of a kind of the table."""
    return make(path, KINDS[name])


def make(path: Path, kind: Kind) -> Path:
    """Write the file of a kind. Its export is made once a run."""
    recipe = {"foreign": repr(kind.export), "torch": torch.__version__}
    source = make_once(recipe, lambda folder: _export(folder / "model.onnx", kind.export)) / "model.onnx"
    if not kind.edits:
        shutil.copyfile(source, path)
        return path
    model = ir.load(source)
    for edit in kind.edits:
        model = edit(model) or model
    ir.save(model, path)
    return path


# edits of what residuals go through


def _residuals(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if "_residual" in (value.name or "")]


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value


def through(*operations: tuple[str, Sequence[np.ndarray], dict[str, Any]]) -> Edit:
    """Let every residual pass through operations, each an operator, its further inputs and its attributes."""

    def edit(model: ir.Model) -> None:
        for value in _residuals(model):
            uses, passed = list(value.uses()), value
            for number, (operator, further, attributes) in enumerate(operations):
                constants = [_constant(model, f"{value.name} {number} {each}", array) for each, array in enumerate(further)]
                node = ir.node(operator, [passed, *constants], attributes)
                model.graph.insert_before(uses[0][0], node)
                passed = node.outputs[0]
            for node, index in uses:
                node.replace_input_with(index, passed)

    return edit


def summed(make: Callable[[ir.Model, ir.Value, ir.Value], list[ir.Node]]) -> Edit:
    """Replace every sum of a skip and a residual by nodes that compute the same; the last one's output is the sum."""

    def edit(model: ir.Model) -> None:
        for residual in _residuals(model):
            (add,) = (node for node in residual.consumers() if node.op_type == "Add")
            skip = next(value for value in add.inputs if value is not residual)
            nodes = make(model, skip, residual)
            for node in nodes:
                model.graph.insert_before(add, node)
            for node, index in list(add.outputs[0].uses()):
                node.replace_input_with(index, nodes[-1].outputs[0])
            model.graph.remove(add, safe=True)

    return edit


def reverse(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    return [ir.node("Add", [residual, skip])]


def subtract(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    negative = ir.node("Neg", [residual])
    return [negative, ir.node("Sub", [skip, negative.outputs[0]])]


def subtract_from_residual(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    negative = ir.node("Mul", [skip, _constant(model, f"{residual.name} minus", number(-1))])
    return [negative, ir.node("Sub", [residual, negative.outputs[0]])]


def negate_all(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    negative = ir.node("Neg", [skip])
    difference = ir.node("Sub", [negative.outputs[0], residual])
    return [negative, difference, ir.node("Neg", [difference.outputs[0]])]


def add_both(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    return [ir.node("Sum", [skip, residual])]


def stack(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    zero = _constant(model, f"{residual.name} zero", np.array([0]))
    parts = [ir.node("Unsqueeze", [value, zero]) for value in (skip, residual)]
    joined = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": 0})
    return [*parts, joined, ir.node("ReduceSum", [joined.outputs[0], zero], {"keepdims": 0})]


def channels_last(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    parts = [ir.node("Transpose", [value], {"perm": [0, 2, 3, 1]}) for value in (skip, residual)]
    added = ir.node("Add", [part.outputs[0] for part in parts])
    return [*parts, added, ir.node("Transpose", [added.outputs[0]], {"perm": [0, 3, 1, 2]})]


def flatten(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    flat = _constant(model, f"{residual.name} flat", np.array([0, 0, -1]))
    parts = [ir.node("Reshape", [value, flat]) for value in (skip, residual)]
    added, shape = ir.node("Add", [part.outputs[0] for part in parts]), ir.node("Shape", [skip])
    return [*parts, added, shape, ir.node("Reshape", [added.outputs[0], shape.outputs[0]])]


def reorder(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    """x + (h + residual), where the skip is x + h; beside a convolution's bias, bias + residual."""
    maker = skip.producer()
    assert maker is not None
    if maker.op_type == "Add":
        inner = ir.node("Add", [maker.inputs[1], residual])
        return [inner, ir.node("Add", [maker.inputs[0], inner.outputs[0]])]
    if maker.op_type != "Conv" or maker.inputs[2] is None:
        return reverse(model, skip, residual)
    bias = maker.inputs[2].const_value.numpy().reshape(1, -1, 1, 1)
    bare = ir.node("Conv", maker.inputs[:2], dict(maker.attributes))
    inner = ir.node("Add", [residual, _constant(model, f"{residual.name} bias", bias)])
    return [bare, inner, ir.node("Add", [bare.outputs[0], inner.outputs[0]])]


def sum_of_three(model: ir.Model, skip: ir.Value, residual: ir.Value) -> list[ir.Node]:
    maker = skip.producer()
    terms = [*maker.inputs] if maker is not None and maker.op_type == "Add" else [skip]
    return [ir.node("Sum", [residual, *terms])]


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def reshape_as_itself(model: ir.Model) -> None:
    for value in _residuals(model):
        uses, shape = list(value.uses()), ir.node("Shape", [value])
        same = ir.node("Reshape", [value, shape.outputs[0]])
        for node in (shape, same):
            model.graph.insert_before(uses[0][0], node)
        for node, index in uses:
            node.replace_input_with(index, same.outputs[0])


# edits of names and declared sizes


def name_slots(*names: str) -> Edit:
    def edit(model: ir.Model) -> None:
        ports = _residuals(model) or list(model.graph.outputs)
        for number, value in enumerate(ports):
            value.name = names[number] if len(names) > 1 else names[0].format(number)

    return edit


def by_scheme(key: str) -> Edit:
    return name_slots(*find_scheme(key).names(4))


def rename(**names: str) -> Edit:
    """Inputs and outputs under other names."""

    def edit(model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.name = names.get(value.name or "", value.name)

    return edit


def name_dims(name: Callable[[str, int, str], str | None]) -> Edit:
    """Give every open size of an input another name, from the input's name, the axis and its name."""

    def edit(model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is not None:
                dims = [
                    dim if isinstance(dim, int) else name(value.name or "", axis, str(dim))
                    for axis, dim in enumerate(value.shape)
                ]
                value.shape = ir.Shape(dims)

    return edit


def forget_names(model: ir.Model) -> None:
    """Nodes, values and weights under numbers, as after an optimiser."""
    numbers = itertools.count()
    for node in model.graph:
        node.name = None
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.name = f"v{next(numbers)}"
    weights = list(model.graph.initializers.values())
    for number, value in enumerate(weights):
        value.name = f"w{number}"


# edits of conditions


def join_conditions(*, embedded: bool = True, name: str = "y") -> Edit:
    """Take SDXL's pooled text and size numbers as one tensor, embedded as ComfyUI does, or plain."""

    def edit(model: ir.Model) -> None:
        graph = model.graph
        text, times = (next(value for value in graph.inputs if value.name == each) for each in ("text_embeds", "time_ids"))
        concat = next(node for node in text.consumers() if node.op_type == "Concat")
        width = text.shape[1] + times.shape[1] * (TEXT_TIME["addition_time_embed_dim"] if embedded else 1)
        y = ir.Value(name=name, shape=ir.Shape([text.shape[0], width]), type=text.type)
        graph.inputs[graph.inputs.index(text)] = y
        graph.inputs.remove(times)
        if embedded:
            for node, index in list(concat.outputs[0].uses()):
                node.replace_input_with(index, y)
            passes.RemoveUnusedNodesPass()(model)
            return
        sizes = _constant(model, "sizes", np.array([text.shape[1], times.shape[1]]))
        split = ir.Node("", "Split", [y, sizes], [ir.AttrInt64("axis", 1)], num_outputs=2)
        graph.insert_before(graph[0], split)
        for value, part in zip((text, times), split.outputs, strict=True):
            for node, index in list(value.uses()):
                node.replace_input_with(index, part)

    return edit


def roll_columns(model: ir.Model, value: ir.Value, step: int) -> None:
    """Exchange the columns of an input, a fault."""
    order = np.roll(np.arange(value.shape[1]), step)
    uses = list(value.uses())
    moved = ir.node("Gather", [value, _constant(model, "columns", order)], {"axis": 1})
    model.graph.insert_before(model.graph[0], moved)
    for node, index in uses:
        node.replace_input_with(index, moved.outputs[0])


# edits of the whole graph


def merge_weights(model: ir.Model) -> None:
    """Keep one of all weights with the same values."""
    passes.DeduplicateInitializersPass()(model)


def list_weights_as_inputs(model: ir.Model) -> None:
    model.graph.inputs.extend(value for value in model.graph.initializers.values() if value not in model.graph.inputs)


def infer_shapes(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def convert_opset(version: int) -> Edit:
    def edit(model: ir.Model) -> ir.Model:
        return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), version))

    return edit


def optimise(level: str) -> Edit:
    """Write what ONNX Runtime makes of it."""

    def edit(model: ir.Model) -> ir.Model:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
        with tempfile.TemporaryDirectory() as folder:
            settings.optimized_model_filepath = str(Path(folder, "model.onnx"))
            onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"])
            return ir.from_proto(onnx.load(settings.optimized_model_filepath))

    return edit


def slim(model: ir.Model) -> ir.Model:
    import onnxslim

    return ir.from_proto(onnxslim.slim(ir.to_proto(model)))


def simplify(model: ir.Model) -> ir.Model:
    import onnxsim

    return ir.from_proto(onnxsim.simplify(ir.to_proto(model))[0])


def _to_half(array: np.ndarray) -> ir.TensorProtocol:
    return ir.tensor(array.astype(np.float16))


def _convert_inside(graph: ir.Graph) -> None:
    full, half = ir.DataType.FLOAT, ir.DataType.FLOAT16
    for value in graph.initializers.values():
        if value.dtype == full:
            value.const_value = _to_half(value.const_value.numpy())
            value.type = ir.TensorType(half)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == full:
                node.attributes[name] = ir.AttrTensor(name, _to_half(attribute.value.numpy()))
            elif node.op_type == "Cast" and name == "to" and attribute.value == full:
                node.attributes["to"] = ir.AttrInt64("to", half)
        for value in node.outputs:
            if value.dtype == full:
                value.type = ir.TensorType(half)


def convert_to_half(model: ir.Model) -> None:
    """Every float32 becomes float16, in the way of the converters."""
    _convert_inside(model.graph)
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)


def convert_inside_to_half(model: ir.Model) -> None:
    """Every float32 becomes float16, but inputs and outputs."""
    graph = model.graph
    _convert_inside(graph)
    for value in [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT]:
        uses, cast = list(value.uses()), ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
        graph.insert_before(graph[0], cast)
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
    for number_, value in enumerate(list(graph.outputs)):
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.name, cast.outputs[0].name = f"{value.name}_half", value.name
        graph.append(cast)
        graph.outputs[number_] = cast.outputs[0]


_PLAIN, _CONTROLNET = Export(), Export("controlnet")
_AUTO, _DYNAMIC = Export(exporter="dynamo", opset=18, dims="AUTO"), Export(exporter="dynamo", opset=20, dims="DYNAMIC")
_EVEN = {"latent": (16, 24)}
_DIFFUSERS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
_COMFYUI = {"sample": "x", "timestep": "timesteps", "encoder_hidden_states": "context"}
_NUMBERED = tuple(f"down_block_{number}" for number in range(4))
_THEIR_SIZES = {"batch": "2B", "h": "H", "w": "W", "ceil(h/2)": "H2", "ceil(w/2)": "W2", "tokens": "77"}


def _name_own(name: str, axis: int, dim: str) -> str:
    return f"{name}_dynamic_axes_{axis}"


KINDS: Mapping[str, Kind] = {
    # exporters
    "torchscript opset 14 unfolded": Kind(Export(opset=14, folding=False)),
    "torchscript opset 16": Kind(Export(opset=16)),
    "torchscript opset 17": Kind(_PLAIN),
    "torchscript opset 18": Kind(Export(opset=18)),
    "torchscript opset 20": Kind(Export(opset=20)),
    "torchscript opset 17 to 19": Kind(_PLAIN, (convert_opset(19),)),
    "torchscript opset 20 to 22": Kind(Export(opset=20), (convert_opset(22),)),
    "torchscript static": Kind(Export(dims="none"), fixed=("batch", "h", "w", "tokens")),
    "torchscript static, even": Kind(Export(dims="none", **_EVEN), fixed=("batch", "h", "w", "tokens")),
    "torchscript static, batch 1": Kind(Export(dims="none", batch=1), fixed=("batch", "h", "w", "tokens")),
    "torchscript even": Kind(Export(**_EVEN), divisor=2),
    "torchscript multiples of 8": Kind(Export("deep", latent=(16, 24)), divisor=8),
    "torchscript batch 2": Kind(Export(dims="batch"), fixed=("batch",)),
    "torchscript batch 2, even": Kind(Export(dims="batch", **_EVEN), divisor=2, fixed=("batch",)),
    "torchscript xl": Kind(Export("xl")),
    "torchscript deep": Kind(Export("deep")),
    "torchscript half": Kind(Export(dtype="float16")),
    "dynamo static": Kind(Export(exporter="dynamo", opset=18, dims="none"), fixed=("batch", "h", "w", "tokens")),
    "dynamo AUTO opset 18": Kind(_AUTO),
    "dynamo AUTO opset 18, even": Kind(Export(exporter="dynamo", opset=18, dims="AUTO", **_EVEN), divisor=2),
    "dynamo AUTO opset 23": Kind(Export(exporter="dynamo", opset=23, dims="AUTO")),
    "dynamo DYNAMIC opset 20": Kind(_DYNAMIC),
    "dynamo DYNAMIC opset 22": Kind(Export(exporter="dynamo", opset=22, dims="DYNAMIC")),
    "dynamo xl AUTO": Kind(Export("xl", exporter="dynamo", opset=21, dims="AUTO")),
    # names of sizes
    "sizes unnamed": Kind(_PLAIN, (name_dims(lambda name, axis, dim: None),)),
    "sizes named by each axis": Kind(_PLAIN, (name_dims(_name_own),)),
    "sizes named as StreamDiffusion's": Kind(_PLAIN, (name_dims(lambda name, axis, dim: _THEIR_SIZES[dim]),)),
    "sizes named h and w everywhere": Kind(_PLAIN, (name_dims(lambda name, axis, dim: dim.strip("ceil(/2)") or dim),)),
    "sizes all named alike": Kind(_PLAIN, (name_dims(lambda name, axis, dim: "dynamic"),)),
    "sizes named by numbers": Kind(_PLAIN, (name_dims(lambda name, axis, dim: f"s{axis}"),)),
    "dynamo sizes unnamed": Kind(_AUTO, (name_dims(lambda name, axis, dim: None),)),
    # names of slots, inputs and outputs
    "slots as StreamDiffusion's": Kind(_PLAIN, (by_scheme("streamdiffusion"),)),
    "slots as ComfyUI's": Kind(_PLAIN, (by_scheme("comfyui"), rename(**_COMFYUI))),
    "slots as optimum-neuron's": Kind(_PLAIN, (by_scheme("optimum-neuron"),)),
    "slots as of 2023": Kind(_PLAIN, (name_slots(*_NUMBERED, "mid_block_additional_residual"),)),
    "slots of no scheme": Kind(_PLAIN, (name_slots("control_{}"),)),
    "slots as numbers": Kind(_PLAIN, (name_slots("{}"), forget_names)),
    "slots counted from one": Kind(_PLAIN, (name_slots("down_block_residual_{}_out"),)),
    "x, timesteps, context": Kind(_PLAIN, (rename(**_COMFYUI),)),
    "latents, t, prompt_embeds": Kind(_PLAIN, (rename(sample="latents", timestep="t", encoder_hidden_states="prompt_embeds"),)),
    "x, timesteps, context, y": Kind(
        Export("xl"),
        (rename(**_COMFYUI, text_embeds="y", time_ids="z"),),
    ),
    "text and sizes in one": Kind(Export("xl"), (rename(**_COMFYUI), join_conditions())),
    "text and sizes in one, plain": Kind(Export("xl"), (join_conditions(embedded=False),)),
    "text and sizes in one of another name": Kind(Export("xl"), (join_conditions(name="vector"),)),
    "text and sizes in one, float16": Kind(Export("xl"), (rename(**_COMFYUI), join_conditions(), convert_to_half)),
    # strengths
    "strength 0.8": Kind(_PLAIN, (through(("Mul", (number(0.8),), {})),)),
    "strength 0.8, float16": Kind(_PLAIN, (through(("Mul", (number(0.8),), {})), convert_to_half)),
    "strength 1.5 of dynamo": Kind(_AUTO, (through(("Div", (number(1 / 1.5),), {})),)),
    # timesteps
    **{
        f"timestep {form}": Kind(Export(timestep=form))
        for form in ("int64", "int32", "float16", "scalar", "one", "int64 scalar", "int64 one", "int32 one")
    },
    "timestep int64, batch 1": Kind(
        Export(timestep="int64", dims="none", batch=1), (rename(timestep="t"),), fixed=("batch", "h", "w", "tokens")
    ),
    "timestep int64, of another name": Kind(Export(timestep="int64"), (rename(timestep="t"),)),
    "dynamo timestep scalar": Kind(Export(exporter="dynamo", opset=18, dims="AUTO", timestep="scalar")),
    "controlnet of one timestep": Kind(Export("controlnet", timestep="int64 one")),
    "xl arg0, arg1": Kind(
        Export("xl"),
        (
            rename(**{name: f"arg{number}" for number, name in enumerate(_DIFFUSERS)}),
            name_slots("arg1{}"),
        ),
    ),
    "output noise_pred": Kind(_PLAIN, (rename(out_sample="noise_pred"),)),
    "output a number": Kind(_PLAIN, (rename(out_sample="1234"),)),
    "no names of nodes": Kind(_PLAIN, (forget_names,)),
    "dynamo names of nobody": Kind(
        _AUTO, (name_slots("r{}"), rename(**dict(zip(_DIFFUSERS, "abc", strict=False)), out_sample="d"), forget_names)
    ),
    # ways to write a sum
    "transposed and back": Kind(
        _PLAIN, (through(("Transpose", (), {"perm": [0, 2, 3, 1]}), ("Transpose", (), {"perm": [0, 3, 1, 2]})),)
    ),
    "sum with channels last": Kind(_PLAIN, (summed(channels_last),)),
    "sum of flat images": Kind(_PLAIN, (summed(flatten),)),
    "reshaped as itself": Kind(_PLAIN, (reshape_as_itself,)),
    "reshaped to zeros": Kind(_PLAIN, (through(("Reshape", (np.array([0, 0, 0, 0]),), {})),)),
    "unsqueezed and back": Kind(_PLAIN, (through(("Unsqueeze", (np.array([0]),), {}), ("Squeeze", (np.array([0]),), {})),)),
    "identities": Kind(_PLAIN, (through(("Identity", (), {}), ("Cast", (), {"to": ir.DataType.FLOAT}), ("Dropout", (), {})),)),
    "times one plus nothing": Kind(_PLAIN, (through(("Mul", (number(1),), {}), ("Add", (np.zeros(1, np.float32),), {})),)),
    "negated twice": Kind(_PLAIN, (through(("Neg", (), {}), ("Neg", (), {})),)),
    "a whole slice": Kind(_PLAIN, (through(("Slice", (np.array([0]), np.array([2**62]), np.array([2])), {})),)),
    "residual first": Kind(_PLAIN, (summed(reverse),)),
    "a - (-b)": Kind(_PLAIN, (summed(subtract),)),
    "b - (-a)": Kind(_PLAIN, (summed(subtract_from_residual),)),
    "-(-a - b)": Kind(_PLAIN, (summed(negate_all),)),
    "Sum of two": Kind(_PLAIN, (summed(add_both),)),
    "Sum of three": Kind(_PLAIN, (summed(sum_of_three),)),
    "stacked and reduced": Kind(_PLAIN, (summed(stack),)),
    "adds reordered": Kind(_PLAIN, (summed(reorder),)),
    "adds reordered, no names": Kind(_PLAIN, (summed(reorder), forget_names)),
    "dynamo a - (-b)": Kind(_AUTO, (summed(subtract),)),
    "dynamo adds reordered": Kind(_AUTO, (summed(reorder),)),
    # graphs that were rewritten
    "weights merged": Kind(_PLAIN, (merge_weights,)),
    "weights among the inputs": Kind(_PLAIN, (list_weights_as_inputs,)),
    "shapes inferred": Kind(_PLAIN, (infer_shapes,)),
    "ONNX Runtime basic": Kind(_PLAIN, (optimise("basic"),)),
    "ONNX Runtime extended": Kind(_PLAIN, (optimise("extended"),)),
    "ONNX Runtime all": Kind(_PLAIN, (optimise("all"),)),
    "ONNX Runtime all, of dynamo": Kind(_AUTO, (optimise("all"),)),
    "ONNX Runtime all, of static": Kind(Export(dims="none"), (optimise("all"),), fixed=("batch", "h", "w", "tokens")),
    "ONNX Runtime all, of xl": Kind(Export("xl"), (optimise("all"),)),
    "onnxslim": Kind(_PLAIN, (slim,)),
    "onnxslim of dynamo": Kind(_AUTO, (slim,)),
    "onnxsim": Kind(_PLAIN, (simplify,)),
    "onnxsim of static": Kind(Export(dims="none"), (simplify,), fixed=("batch", "h", "w", "tokens")),
    "float16": Kind(_PLAIN, (convert_to_half,)),
    "float16 inside float32": Kind(_PLAIN, (convert_inside_to_half,)),
    "float16 of dynamo": Kind(_AUTO, (convert_to_half,)),
    # other models
    "torchscript lcm": Kind(Export("lcm")),
    "torchscript inpaint": Kind(Export("inpaint")),
    "torchscript labels": Kind(Export("labels")),
    "dynamo lcm AUTO": Kind(Export("lcm", exporter="dynamo", opset=18, dims="AUTO")),
    # sizes of which some are open
    "tokens fixed": Kind(Export(dims="tokens"), fixed=("tokens",)),
    "width fixed": Kind(Export(dims="w"), fixed=("w",)),
    "batch 1 and tokens fixed": Kind(Export(dims="batch, tokens", batch=1), fixed=("batch", "tokens")),
    # inputs and outputs that others add or move
    "TensorRT's demo": Kind(_PLAIN, (by_scheme("streamdiffusion"), graphs.float32_within_float16)),
    "slots with slashes": Kind(_PLAIN, (name_slots("/control/{}"),)),
    "slots with spaces": Kind(_PLAIN, (name_slots("control {} out"),)),
    "an unused number": Kind(_PLAIN, (graphs.unused_input,)),
    "an unused image": Kind(_PLAIN, (graphs.unused_image,)),
    "one more output": Kind(_PLAIN, (graphs.extra_output(),)),
    "one more output, before": Kind(_PLAIN, (graphs.extra_output(first=True),)),
    "the same output twice": Kind(_PLAIN, (graphs.same_output_twice,)),
    "output through identities": Kind(_PLAIN, (graphs.rename_last,)),
    "inputs in reverse": Kind(_PLAIN, (graphs.order_inputs(reverse=True),)),
    "mid first": Kind(_PLAIN, (graphs.order_inputs("mid_block_residual"),)),
    "slots of no scheme in reverse": Kind(_PLAIN, (name_slots("control_{}"), graphs.order_inputs(reverse=True))),
    "a strength with a default": Kind(_PLAIN, (graphs.strength_with_a_default,)),
    # other graphs
    "a branch": Kind(_PLAIN, (graphs.branch,)),
    "a loop": Kind(_PLAIN, (graphs.loop,)),
    "sums in functions": Kind(_PLAIN, (graphs.sums_in_functions,)),
    "activations in functions": Kind(_PLAIN, (graphs.activations_in_functions,)),
    "functions of dynamo": Kind(_AUTO, (graphs.activations_in_functions,)),
    "weights in nodes": Kind(_PLAIN, (graphs.weights_in_nodes,)),
    "operators of others imported": Kind(_PLAIN, (graphs.import_other_operators,)),
    "ONNX Runtime's optimiser for UNets": Kind(_PLAIN, (graphs.optimise_as_unet,)),
    "ONNX Runtime's optimiser for UNets on a GPU": Kind(_PLAIN, (graphs.optimise_for_gpu,)),
    "ONNX Runtime layout": Kind(_PLAIN, (optimise("layout"),)),
    "bfloat16": Kind(Export(dtype="bfloat16")),
    "float16 of xl": Kind(Export("xl", dtype="float16")),
    "float16, ONNX Runtime all": Kind(Export(dtype="float16"), (optimise("all"),)),
    # ControlNets
    "controlnet": Kind(_CONTROLNET),
    "controlnet static": Kind(Export("controlnet", dims="none"), fixed=("batch", "h", "w", "tokens")),
    "controlnet dynamo": Kind(Export("controlnet", exporter="dynamo", opset=18, dims="AUTO")),
    "controlnet as StreamDiffusion's": Kind(_CONTROLNET, (by_scheme("streamdiffusion"),)),
    "controlnet as of 2023": Kind(_CONTROLNET, (name_slots(*_NUMBERED, "mid_block_res_sample"),)),
    "controlnet of numbers": Kind(_CONTROLNET, (name_slots("{}"), forget_names)),
    "controlnet of other inputs": Kind(_CONTROLNET, (rename(**_COMFYUI, controlnet_cond="hint"),)),
    "controlnet ONNX Runtime all": Kind(_CONTROLNET, (optimise("all"),)),
    "controlnet of strength 1": Kind(Export("controlnet", strength=1.0)),
    "controlnet of strength 0.7": Kind(Export("controlnet", strength=0.7)),
    "controlnet of strength 0.7 and other names": Kind(Export("controlnet", strength=0.7), (name_slots("out{}"),)),
    "controlnet inside": Kind(Export(inside=True)),
    "controlnet inside, other names": Kind(
        Export(inside=True), (rename(controlnet_cond="controlnet_conds", conditioning_scale="conditioning_scales"),)
    ),
    "controlnet inside at strength 0.7": Kind(Export(inside=True, strength=0.7)),
}
REFUSED = {
    "it holds several residuals in one tensor": graphs.join_residuals,
    "its channels are last": graphs.latents_last,
    "it doubles the batch and guides inside": graphs.guidance_inside,
}
"""What is said of files that are right and no UNets with slots."""
UNRUNNABLE = ("ONNX Runtime's optimiser for UNets on a GPU", "bfloat16")
"""Kinds that ONNX Runtime cannot run on a CPU."""
