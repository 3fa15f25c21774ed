"""Edits that write a whole graph otherwise: branches, functions, constants, inputs and outputs that others add or move."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

DOMAIN = "their.functions"


def on_proto(edit: Callable[[onnx.ModelProto], None]) -> Callable[[ir.Model], ir.Model]:
    def edit_ir(model: ir.Model) -> ir.Model:
        proto = ir.to_proto(model)
        edit(proto)
        return ir.from_proto(proto)

    return edit_ir


def _last(graph: onnx.GraphProto) -> onnx.NodeProto:
    return next(node for node in graph.node if graph.output[0].name in node.output)


@on_proto
def branch(proto: onnx.ModelProto) -> None:
    """The last node in a branch that is always taken."""
    graph = proto.graph
    node = _last(graph)
    place = list(graph.node).index(node)
    output = helper.make_tensor_value_info("then_out", TensorProto.FLOAT, None)
    inner = helper.make_node(node.op_type, node.input, ["then_out"], name="then")
    inner.attribute.extend(node.attribute)
    zero = helper.make_node("Mul", ["then_sample", "then_sample"], ["else_out"])
    wrong = helper.make_node("Identity", [graph.input[0].name], ["then_sample"])
    other = helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)
    graph.initializer.append(helper.make_tensor("always", TensorProto.BOOL, [], [True]))
    taken = helper.make_node(
        "If",
        ["always"],
        list(node.output),
        then_branch=helper.make_graph([inner], "then", [], [output]),
        else_branch=helper.make_graph([wrong, zero], "else", [], [other]),
    )
    graph.node.remove(node)
    graph.node.insert(place, taken)


@on_proto
def loop(proto: onnx.ModelProto) -> None:
    """The last node in a loop of one turn."""
    graph = proto.graph
    node = _last(graph)
    place = list(graph.node).index(node)
    inner = helper.make_node(node.op_type, ["turned", *node.input[1:]], ["turn_out"])
    inner.attribute.extend(node.attribute)
    body = helper.make_graph(
        [helper.make_node("Identity", [node.input[0]], ["turned"]), helper.make_node("Identity", ["on_in"], ["on"]), inner],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("on_in", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("turn_out", TensorProto.FLOAT, [None] * 4),
        ],
    )
    graph.initializer.extend(
        [helper.make_tensor("turns", TensorProto.INT64, [], [1]), helper.make_tensor("goes_on", TensorProto.BOOL, [], [True])]
    )
    zero = helper.make_node("Constant", [], ["first"], value=helper.make_tensor("", TensorProto.INT64, [1], [0]))
    graph.node.remove(node)
    graph.node.insert(place, zero)
    graph.node.insert(place + 1, helper.make_node("Loop", ["turns", "goes_on"], ["turned_all"], body=body))
    graph.node.insert(place + 2, helper.make_node("Squeeze", ["turned_all", "first"], list(node.output)))


def _make_function(
    proto: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str]
) -> None:
    opsets = [each for each in proto.opset_import if not each.domain]
    proto.functions.append(helper.make_function(DOMAIN, name, inputs, outputs, nodes, opsets))
    if not any(each.domain == DOMAIN for each in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))


@on_proto
def sums_in_functions(proto: onnx.ModelProto) -> None:
    """Every sum of a skip and a residual is a function of the file's own."""
    _make_function(
        proto, "AddResidual", [helper.make_node("Add", ["skip", "residual"], ["sum"])], ["skip", "residual"], ["sum"]
    )
    residuals = {each.name for each in proto.graph.input if "_residual" in each.name}
    for node in proto.graph.node:
        if node.op_type == "Add" and residuals & {*node.input}:
            if node.input[0] in residuals:
                node.input[:] = reversed(node.input)
            node.op_type, node.domain = "AddResidual", DOMAIN


@on_proto
def activations_in_functions(proto: onnx.ModelProto) -> None:
    """Every SiLU is a function of the file's own, where the graph has one."""
    nodes = [helper.make_node("Sigmoid", ["x"], ["gate"]), helper.make_node("Mul", ["x", "gate"], ["y"])]
    _make_function(proto, "Silu", nodes, ["x"], ["y"])
    graph = proto.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in [node for node in graph.node if node.op_type == "Sigmoid"]:
        (reader,) = readers[node.output[0]]
        if reader.op_type == "Mul" and node.input[0] in reader.input:
            reader.op_type, reader.domain = "Silu", DOMAIN
            reader.input[:] = [node.input[0]]
            graph.node.remove(node)


@on_proto
def weights_in_nodes(proto: onnx.ModelProto) -> None:
    """Every weight is the constant of a node."""
    graph = proto.graph
    nodes = [helper.make_node("Constant", [], [each.name], value=each) for each in graph.initializer]
    del graph.initializer[:]
    for node in reversed(nodes):
        graph.node.insert(0, node)


@on_proto
def import_other_operators(proto: onnx.ModelProto) -> None:
    """Sets of operators that no node is of, and words of others in the metadata."""
    proto.opset_import.extend([helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("ai.onnx.ml", 3)])
    proto.metadata_props.add(key="model_author", value="somebody")
    proto.doc_string = "a UNet\nof somebody"


@on_proto
def unused_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("guidance_scale", TensorProto.FLOAT, [1]))


@on_proto
def unused_image(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1, "h", "w"]))


def extra_output(*, first: bool = False) -> Callable[[ir.Model], ir.Model]:
    """An image inside, of the mid block's, as one more output."""

    @on_proto
    def edit(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        inner = next(node for node in graph.node if "mid_block_residual" in node.input or node.op_type == "AddResidual")
        graph.node.append(helper.make_node("Identity", [inner.output[0]], ["mid_features"]))
        output = helper.make_tensor_value_info("mid_features", TensorProto.FLOAT, ["batch", 16, "mid_h", "mid_w"])
        graph.output.insert(0 if first else 1, output)

    return edit


@on_proto
def same_output_twice(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    graph.node.append(helper.make_node("Identity", [graph.output[0].name], ["sample_out"]))
    graph.output.append(helper.make_tensor_value_info("sample_out", TensorProto.FLOAT, ["batch", 4, "h", "w"]))


@on_proto
def rename_last(proto: onnx.ModelProto) -> None:
    """The output through nodes that change nothing."""
    graph = proto.graph
    node, name = _last(graph), graph.output[0].name
    node.output[:] = ["nearly"]
    graph.node.append(helper.make_node("Identity", ["nearly"], ["almost"]))
    graph.node.append(helper.make_node("Identity", ["almost"], [name]))


def order_inputs(*first: str, reverse: bool = False) -> Callable[[ir.Model], ir.Model]:
    """Those of `first` before the others, or all in reverse."""

    @on_proto
    def edit(proto: onnx.ModelProto) -> None:
        inputs = sorted(proto.graph.input, key=lambda each: each.name not in first)
        del proto.graph.input[:]
        proto.graph.input.extend(reversed(inputs) if reverse else inputs)

    return edit


@on_proto
def strength_with_a_default(proto: onnx.ModelProto) -> None:
    """Residuals times an input that need not be given: it is 1."""
    graph = proto.graph
    residuals = {each.name for each in graph.input if "_residual" in each.name}
    graph.input.append(helper.make_tensor_value_info("control_scale", TensorProto.FLOAT, []))
    graph.initializer.append(helper.make_tensor("control_scale", TensorProto.FLOAT, [], [1.0]))
    for node in [node for node in graph.node if residuals & {*node.input}]:
        for place, name in enumerate(node.input):
            if name in residuals:
                scaled = helper.make_node("Mul", [name, "control_scale"], [f"{name}_scaled"])
                graph.node.insert(list(graph.node).index(node), scaled)
                node.input[place] = f"{name}_scaled"


def float32_within_float16(model: ir.Model) -> ir.Model:
    """Inputs and outputs in float16, all between in float32: what TensorRT's demo and others do to save copies."""
    proto = ir.to_proto(model)
    graph = proto.graph
    for number, each in enumerate(list(graph.input)):
        if each.type.tensor_type.elem_type == TensorProto.FLOAT and each.name != "timestep":
            each.type.tensor_type.elem_type = TensorProto.FLOAT16
            for node in graph.node:
                node.input[:] = [f"{name}_full" if name == each.name else name for name in node.input]
            graph.node.insert(number, helper.make_node("Cast", [each.name], [f"{each.name}_full"], to=TensorProto.FLOAT))
    node, name = _last(graph), graph.output[0].name
    node.output[:] = [f"{name}_full"]
    graph.node.append(helper.make_node("Cast", [f"{name}_full"], [name], to=TensorProto.FLOAT16))
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]
    return ir.from_proto(proto)


def optimise_as_unet(model: ir.Model, *, for_gpu: bool = False) -> ir.Model:
    """ONNX Runtime's own optimiser for UNets, which fuses attention and norms."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("unet")
    options.enable_nhwc_conv = options.enable_group_norm = options.enable_skip_group_norm = for_gpu
    options.enable_bias_splitgelu = options.enable_bias_add = for_gpu
    options.enable_packed_kv = options.enable_packed_qkv = options.enable_attention = False  # it fails with NumPy 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save(ir.to_proto(model), path)
        optimised = optimizer.optimize_model(str(path), "unet", 2, 4, optimization_options=options, opt_level=0)
        optimised.topological_sort()
        proto = optimised.model
        if not any(each.domain == "com.microsoft" for each in proto.opset_import):
            proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return ir.from_proto(proto)


def optimise_for_gpu(model: ir.Model) -> ir.Model:
    return optimise_as_unet(model, for_gpu=True)


# what is no UNet with slots, and has to be called so


@on_proto
def join_residuals(proto: onnx.ModelProto) -> None:
    """All residuals flat in one tensor: each is a slice of it, reshaped to its skip."""
    graph = proto.graph
    residuals = [each for each in graph.input if "_residual" in each.name]
    for number, each in enumerate(residuals):
        graph.input.remove(each)
        bounds = [helper.make_tensor(f"{name} {number}", TensorProto.INT64, [1], [value]) for name, value in
                  (("from", number), ("to", number + 1), ("axis", 1))]  # fmt: skip
        graph.initializer.extend(bounds)
        slice_ = helper.make_node("Slice", ["residuals", *(bound.name for bound in bounds)], [f"{each.name}_mean"])
        add = next(node for node in graph.node if each.name in node.input)
        add.input[:] = [f"{each.name}_mean" if name == each.name else name for name in add.input]
        graph.node.insert(0, slice_)
    graph.input.append(helper.make_tensor_value_info("residuals", TensorProto.FLOAT, ["batch", len(residuals), "h", "w"]))


@on_proto
def latents_last(proto: onnx.ModelProto) -> None:
    """Latents and image as (batch, height, width, channels)."""
    graph = proto.graph
    sample = next(each for each in graph.input if each.name == "sample")
    for node in graph.node:
        node.input[:] = ["sample_first" if name == "sample" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Transpose", ["sample"], ["sample_first"], perm=[0, 3, 1, 2]))
    dims = sample.type.tensor_type.shape.dim
    channels = dims[1].dim_value
    del dims[:]
    for size in ("batch", "h", "w"):
        dims.add().dim_param = size
    dims.add().dim_value = channels


@on_proto
def guidance_inside(proto: onnx.ModelProto) -> None:
    """Latents are doubled inside, and the image is that of classifier-free guidance."""
    graph = proto.graph
    for node in graph.node:
        node.input[:] = ["sample_twice" if name == "sample" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Concat", ["sample", "sample"], ["sample_twice"], axis=0))
    node, name = _last(graph), graph.output[0].name
    node.output[:] = ["both"]
    graph.node.append(helper.make_node("Split", ["both"], ["without", "with"], axis=0))
    graph.node.append(helper.make_node("Sub", ["with", "without"], ["direction"]))
    graph.initializer.append(helper.make_tensor("guidance", TensorProto.FLOAT, [], [7.5]))
    graph.node.append(helper.make_node("Mul", ["direction", "guidance"], ["guided"]))
    graph.node.append(helper.make_node("Add", ["without", "guided"], [name]))
