"""ONNX files for the tests of `check`: small real UNets as others export them, drawn plans of any contract, planted faults."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from artefacts import identify, make_once
from onnx import TensorProto, helper
from small import unet
from torch import nn

from shapecheck import Contract, Geometry, probe
from shapecheck.contract import Input, Slot
from shapecheck.observe.probe import probe_controlnet
from shapecheck.observe.subject import copy_to_meta
from shapecheck.onnx import check as checking
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile
from shapecheck.onnx.records import FileCheck

XL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 20,
}
"""SDXL's inputs on two levels."""
DEEP = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
    "layers_per_block": 1,
}
"""Three halvings, as SD1.5 has."""


def check(path: str | Path, *args: object, **options: object) -> FileCheck:
    """Check the file at a path."""
    return checking.check(OnnxFile(path), *args, **options)


class Flat(nn.Module):
    """The wrapper everybody writes to export a UNet; `constants` are baked, as where a wrapper forgets an input."""

    def __init__(self, model: nn.Module, contract: Contract, constants: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.contract = model, contract
        self.constants = {name: value[:1] for name, value in constants.items()}

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        waiting = list(given)
        call: dict = {}
        for each in self.contract.inputs:
            group, _, key = each.argument.rpartition(".")
            value = waiting.pop(0) if each.name not in self.constants else self.constants[each.name]
            if each.name in self.constants:
                value = value.expand(given[0].shape[0], *value.shape[1:])
            (call.setdefault(group, {}) if group else call)[key] = value
        residuals, features = waiting[: len(self.contract.slots)], waiting[len(self.contract.slots) :]
        if features:
            call["down_intrablock_additional_residuals"] = features
        return self.model(
            **call,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]


def exported(path: Path, config: dict, *, latent: tuple[int, int], **options) -> tuple[Path, Contract]:
    """A small real UNet through torch's TorchScript exporter, dynamic axes named as a contract names them."""
    return written(path, unet(**config), latent=latent, **options)


def written(
    path: Path, model: nn.Module, *, latent: tuple[int, int], baked: tuple[str, ...] = (), adapter: bool = False
) -> tuple[Path, Contract]:
    """The same for a live UNet, with an `adapter` taking its features too.

    Exported once a run for all who ask for the same model; each has a copy.
    """

    def export(folder: Path) -> None:
        contract = probe(copy_to_meta(model), adapter=adapter or None)  # the same, and nothing is computed
        (folder / "contract.json").write_text(contract.to_json(), encoding="utf-8")
        _trace(folder / "unet.onnx", model, contract, latent, baked)

    recipe = {"exporter": "TorchScript", "latent": latent, "baked": baked, "adapter": adapter, **identify(model)}
    made = make_once(recipe, export)
    shutil.copyfile(made / "unet.onnx", path)
    return path, Contract.from_json((made / "contract.json").read_text(encoding="utf-8"))


def _trace(path: Path, model: nn.Module, contract: Contract, latent: tuple[int, int], baked: tuple[str, ...]) -> None:
    rules = {each.name: each.shape for each in (*contract.inputs, *contract.residuals)}
    dtypes = contract.input_dtypes
    shapes = contract.input_shapes(Geometry(2, *latent, 7))
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, dtypes[name])) for name, shape in shapes.items()}
    constants = {name: tensors.pop(name) for name in baked}
    axes = {name: {axis: str(dim) for axis, dim in enumerate(rules[name]) if dim.symbol} for name in tensors}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Flat(model, contract, constants),
            tuple(tensors.values()),
            str(path),
            input_names=list(tensors),
            output_names=["out_sample"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


class FlatControlNet(nn.Module):
    """A ControlNet with a tensor for every input and a list of tensors for an output."""

    def __init__(self, model: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.model, self.contract = model, contract

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call: dict = {}
        for each, value in zip(self.contract.inputs, given, strict=True):
            group, _, key = each.argument.rpartition(".")
            (call.setdefault(group, {}) if group else call)[key] = value
        downs, mid = self.model(**call, return_dict=False)
        return (*downs, mid)


def controlnet_written(path: Path, model: nn.Module, *, latent: tuple[int, int]) -> Path:
    """A live ControlNet in the same way, with its contract inside."""
    recipe = {"exporter": "TorchScript", "latent": latent, **identify(model)}
    made = make_once(recipe, lambda folder: _trace_controlnet(folder / "controlnet.onnx", model, latent))
    shutil.copyfile(made / "controlnet.onnx", path)
    return path


def _trace_controlnet(path: Path, model: nn.Module, latent: tuple[int, int]) -> None:
    contract = probe_controlnet(copy_to_meta(model))
    rules = {each.name: each.shape for each in (*contract.inputs, *contract.slots)}
    shapes = contract.input_shapes(Geometry(2, *latent, 7))
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, contract.input_dtypes[name])) for name, shape in shapes.items()}
    axes = {name: {axis: str(dim) for axis, dim in enumerate(rule) if dim.symbol} for name, rule in rules.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            FlatControlNet(model, contract),
            tuple(tensors.values()),
            str(path),
            input_names=list(tensors),
            output_names=[slot.name for slot in contract.slots],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    file = onnx.load(path)
    file.metadata_props.add(key=CONTRACT_KEY, value=contract.to_json())
    onnx.save(file, path)


def planted(source: Path, target: Path, *edits) -> Path:
    """A copy of a file with each edit made to its onnx_ir model."""
    model = ir.load(source)
    for edit in edits:
        edit(model)
    ir.save(model, target)
    return target


def _input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def unconsume(name: str):
    """The skip goes on without its residual."""

    def edit(model: ir.Model) -> None:
        residual = _input(model, name)
        (add,) = residual.consumers()
        skip = next(value for value in add.inputs if value is not residual)
        for node, index in list(add.outputs[0].uses()):
            node.replace_input_with(index, skip)
        model.graph.remove(add, safe=True)

    return edit


def exchange(one: str, other: str):
    """Each residual is added where the other belongs."""

    def edit(model: ir.Model) -> None:
        values = [_input(model, one), _input(model, other)]
        uses = [list(value.uses()) for value in values]
        for value, places in zip(reversed(values), uses, strict=True):
            for node, index in places:
                node.replace_input_with(index, value)

    return edit


def rename(**names: str):
    """Inputs under other names."""

    def edit(model: ir.Model) -> None:
        values = {old: _input(model, old) for old in names}
        for old, new in names.items():
            values[old].name = new

    return edit


def declare(name: str, *dims: int | str | None):
    """An input with another declared shape."""

    def edit(model: ir.Model) -> None:
        _input(model, name).shape = ir.Shape(dims)

    return edit


def fix(sizes: dict[str, int]):
    """Numbers in place of names of sizes."""

    def edit(model: ir.Model) -> None:
        for value in model.graph.inputs:
            value.shape = ir.Shape([sizes.get(str(dim), dim) for dim in value.shape])

    return edit


def retype(name: str, dtype: ir.DataType):
    """An input of another type, cast to its old one inside."""

    def edit(model: ir.Model) -> None:
        value = _input(model, name)
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(value.dtype))])
        uses = list(value.uses())
        value.dtype = dtype
        model.graph.insert_before(model.graph[0], cast)
        for node, index in uses:
            if node is not cast:
                node.replace_input_with(index, cast.outputs[0])

    return edit


def scale(name: str):
    """A residual that is multiplied by a conditioning scale, an input of its own, before it is added."""

    def edit(model: ir.Model) -> None:
        value = _input(model, name)
        factor = ir.Value(name="conditioning_scale", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.inputs.append(factor)
        multiply = ir.Node("", "Mul", [value, factor])
        uses = [(node, index) for node, index in value.uses() if node is not multiply]
        model.graph.insert_before(uses[0][0], multiply)
        for node, index in uses:
            node.replace_input_with(index, multiply.outputs[0])

    return edit


def measure_residuals(model: ir.Model) -> None:
    """Sizes are read off the residuals instead of the sums they go into, as torch's dynamo exporter likes to."""
    for residual in [value for value in model.graph.inputs if "residual" in value.name]:
        (add,) = residual.consumers()
        for node in [node for node in add.outputs[0].consumers() if node.op_type == "Shape"]:
            node.replace_input_with(0, residual)


def drop(name: str):
    """An input that nothing takes goes away."""

    def edit(model: ir.Model) -> None:
        model.graph.inputs.remove(_input(model, name))

    return edit


def bake(name: str, *, sized_by: str = ""):
    """Zeros are used in an input's place; only its size still matters, or that of another."""

    def edit(model: ir.Model) -> None:
        value = _input(model, name)
        shape = ir.Node("", "Shape", [_input(model, sized_by or name)])
        zeros = ir.Node("", "ConstantOfShape", [shape.outputs[0]])
        for node, index in list(value.uses()):
            if node is not shape:
                node.replace_input_with(index, zeros.outputs[0])
        model.graph.insert_before(model.graph[0], (shape, zeros))

    return edit


def add_again(name: str):
    """A residual is added to its skip, and to their sum once more."""

    def edit(model: ir.Model) -> None:
        value = _input(model, name)
        (add,) = value.consumers()
        again = ir.Node("", "Add", [add.outputs[0], value])
        uses = list(add.outputs[0].uses())
        model.graph.insert_after(add, again)
        for node, index in uses:
            if node is not again:
                node.replace_input_with(index, again.outputs[0])

    return edit


def widen_first(channels: int):
    """The first convolution takes another number of channels."""

    def edit(model: ir.Model) -> None:
        weight = next(value for value in model.graph.initializers.values() if value.name == "conv_in.weight")
        shape = ir.Shape([weight.shape[0], channels, 3, 3])
        weight.const_value = ir.ExternalTensor("nowhere.safetensors", 0, 1, ir.DataType.FLOAT, shape=shape, name=weight.name)
        weight.shape = shape

    return edit


def freeze(*shape: int):
    """The sample goes through a fixed shape, as a trace leaves it that took a number for a size; 1 leaves an axis open."""

    def edit(model: ir.Model) -> None:
        sample = _input(model, "sample")
        uses = list(sample.uses())
        frozen = ir.Value(name="frozen", const_value=ir.tensor(shape, name="frozen"))
        model.graph.register_initializer(frozen)
        spread = ir.Node("", "Expand", [sample, frozen])
        model.graph.insert_before(model.graph[0], spread)
        for node, index in uses:
            node.replace_input_with(index, spread.outputs[0])

    return edit


def forget_names(model: ir.Model) -> None:
    """Nodes and values under numbers, as after an optimiser."""
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.name = f"v{number}"


def without_halving(contract: Contract) -> Contract:
    """The contract of a UNet of the same channels whose every skip is as large as the latent."""
    slots = tuple(replace(slot, skip=(*slot.skip[:2], *contract.inputs[0].shape[2:])) for slot in contract.slots)
    return replace(contract, slots=slots)


def move(name: str, to: str):
    """A residual is added where another was, which is dropped."""

    def edit(model: ir.Model) -> None:
        unconsume(name)(model)
        value, dropped = _input(model, name), _input(model, to)
        for node, index in list(dropped.uses()):
            node.replace_input_with(index, value)
        model.graph.inputs.remove(dropped)

    return edit


def double_output(model: ir.Model) -> None:
    """The output is twice as high and wide as the sample."""
    scales = ir.Value(name="doubled", const_value=ir.tensor([1.0, 1.0, 2.0, 2.0], name="doubled"))
    model.graph.register_initializer(scales)
    old = model.graph.outputs[0]
    resize = ir.Node("", "Resize", [old, None, scales], [ir.AttrString("mode", "nearest")])
    new = resize.outputs[0]
    new.name, new.type, old.name = old.name, old.type, "before"
    model.graph.append(resize)
    model.graph.outputs[0] = new


def foreign(op_type: str):
    """Every node of a kind becomes an operator of a domain nobody knows."""

    def edit(model: ir.Model) -> None:
        model.opset_imports["somewhere"] = 1
        for node in model.graph:
            if node.op_type == op_type:
                node.domain, node.op_type = "somewhere", f"Odd{op_type}"

    return edit


def plan(path: Path, contract: Contract, *, inside: bool = False) -> Path:
    """A graph without weights that takes and gives what a contract says: no model, only its plan.

    Each skip is a convolution of the one before, and all begin with the sum of the sample and the means of the other inputs.
    A UNet's residuals are added to the skips, and the sample to the means of those sums; a ControlNet gives the skips.
    """
    drawing = _Drawing(contract.inputs[0].shape[1].scale)
    value = drawing.with_means("sample", [each.name for each in contract.inputs[1:] if each.dtype == "float32"])
    skips = []
    for slot in contract.slots:
        if not skips or slot.producer != contract.slots[len(skips) - 1].producer:  # KOALA's last two share their skip
            value = drawing.convolution(slot.producer, value, slot.channels, stride=2 if slot.stride > drawing.stride else 1)
        drawing.stride = slot.stride
        skips.append(value)
    if contract.role == "unet":
        sums = [drawing.node("Add", skip, slot.name) for skip, slot in zip(skips, contract.slots, strict=True)]
        rest = [drawing.node("Cast", each.name, to=TensorProto.FLOAT) for each in contract.inputs if each.dtype == "int64"]
        ends = {"out_sample": drawing.with_means("sample", [*sums, *rest])}
        outputs = [_declared("out_sample", contract.inputs[0])]
    else:
        ends = {slot.name: skip for slot, skip in zip(contract.slots, skips, strict=True)}
        outputs = [_declared(slot.name, slot) for slot in contract.slots]
    drawing.nodes += [helper.make_node("Identity", [value], [name]) for name, value in ends.items()]
    inputs = [_declared(each.name, each) for each in contract.inputs]
    inputs += [_declared(slot.name, slot) for slot in contract.slots if contract.role == "unet"]
    graph = helper.make_graph(drawing.nodes, "plan", inputs, outputs, drawing.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if inside:
        helper.set_model_props(model, {"shapecheck.contract": contract.to_json()})
    onnx.save(model, path)
    return path


class _Drawing:
    """Nodes as they are drawn."""

    def __init__(self, channels: int) -> None:
        self.nodes: list = []
        self.initializers: list = [
            helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)
            for name, numbers in (("flat", [0, -1]), ("deep", [-1, 1, 1, 1]))
        ]
        self.channels = channels
        self.stride = 1

    def node(self, op_type: str, *inputs: str, name: str = "", **attributes) -> str:
        output = f"{name or op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def with_means(self, image: str, others: list[str]) -> str:
        for other in others:
            mean = self.node("ReduceMean", self.node("Reshape", other, "flat"), axes=[1])
            image = self.node("Add", image, self.node("Reshape", mean, "deep"))
        return image

    def convolution(self, path: str, value: str, channels: int, stride: int) -> str:
        weight = TensorProto(name=f"{path}.weight", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        weight.dims.extend((channels, self.channels, 3, 3))
        weight.external_data.add(key="location", value="nowhere.safetensors")
        self.initializers.append(weight)
        self.channels = channels
        options = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [stride, stride]}
        return self.node("Conv", value, weight.name, name=f"/{path.replace('.', '/')}/Conv", **options)


def _declared(name: str, each: Input | Slot) -> onnx.ValueInfoProto:
    element = TensorProto.INT64 if isinstance(each, Input) and each.dtype == "int64" else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, element, [str(dim) if dim.symbol else dim.scale for dim in each.shape])
