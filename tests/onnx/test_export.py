"""What `export` refuses before it writes anything: models, options, and graphs that are not what the contract says.

The files that it writes are in `test_exported.py`.
"""

from __future__ import annotations

import json

import onnx_files
import onnx_ir
import pytest
import small
import torch
from small import SHALLOW

from shapecheck import ShapecheckError, export, probe
from shapecheck.observe.probe import probe_controlnet
from shapecheck.onnx import postconditions
from shapecheck.onnx.shapes import parameters_to_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as diffusers saves it."""
    folder = tmp_path_factory.mktemp("model")
    small.unet(**SHALLOW).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "link", "dtype": "float16"}, "--weights link: the checkpoint is float32 and the graph float16"),
        ({"dtype": "int8"}, "no dtype 'int8'; known: float32, float16, bfloat16"),
        ({"dtype": "bfloat16", "opset": 20}, "opset 20 with bfloat16: expected 22 to 23"),
        ({"naming": "webui"}, "no naming scheme 'webui'"),
        ({"variant": "fp16"}, "fp16"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(folder, tmp_path, options, message):
    with pytest.raises(ShapecheckError, match=message):
        export(str(folder), tmp_path / "unet.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_preset_has_no_weights_and_a_missing_folder_is_told(folder, tmp_path):
    with pytest.raises(ShapecheckError, match="no weights for sd15: preset sd15 is a configuration without weights"):
        export("sd15", tmp_path / "unet.onnx", weights="copy")
    with pytest.raises(ShapecheckError, match=r"cannot write .*nowhere"):
        export(str(folder), tmp_path / "nowhere" / "unet.onnx")


def test_a_configuration_alone_is_exported_without_weights_only(tmp_path):
    small.unet(**SHALLOW).save_config(tmp_path / "unet")
    with pytest.raises(ShapecheckError, match=r"no weights for .*there are no weights beside .*; give .*, or --weights none"):
        export(str(tmp_path / "unet"), tmp_path / "unet.onnx")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    small.unet(**SHALLOW).save_pretrained(tmp_path / "unet")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 20}), encoding="utf-8")
    with pytest.raises(ShapecheckError, match=r"attn2\.to_k\.weight"):
        export(str(tmp_path), tmp_path / "unet.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["unet"]


# Graphs as the exporter checks them, before weights are bound; drawn, and marked with modules as PyTorch's exporter does.


def mark(node, module):
    """Say in which module a node was traced."""
    node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", f"model.{module}" if module else "model", node.name])


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The graph of a UNet and the contract it is checked against."""
    with torch.device("meta"):
        contract = probe(small.unet(**SHALLOW))
    model = onnx_ir.load(onnx_files.plan(tmp_path_factory.mktemp("traced") / "unet.onnx", contract))
    parameters_to_inputs(model.graph)
    for slot in contract.slots:
        residual = next(value for value in model.graph.inputs if value.name == slot.name)
        (add,) = residual.consumers()
        (skip,) = (value for value in add.inputs if value is not residual)
        skip.name = f"{slot.producer}.out"
        mark(add, slot.adds[0].owner)
        mark(skip.producer(), slot.producer)
    return model, contract


def swapped(model):
    """Two slots of one shape exchanged: no shape can show it."""
    onnx_files.exchange("down_block_residual_00", "down_block_residual_01")(model)


def used_twice(model):
    residual = next(each for each in model.graph.inputs if each.name == "mid_block_residual")
    model.graph.append(onnx_ir.node("Neg", [residual]))


def added_elsewhere(model):
    residual = next(each for each in model.graph.inputs if each.name == "mid_block_residual")
    mark(residual.consumers()[0], "up_blocks.0")


def renamed(model):
    model.graph.inputs[1].name = "t"


def undeclared(model):
    model.graph.inputs[3].shape = onnx_ir.Shape(["batch", 8, "height", "w"])


def fixed_size(model):
    """As where a size was taken for a constant: right at the traced size only."""
    onnx_files.freeze(2, 1, 9, 13)(model)


def doubled(model):
    """An image of another size than the sample's."""
    onnx_files.double_output(model)
    model.graph.outputs[0].shape = onnx_ir.Shape(["batch", 4, "height", "width"])


def sequence(model):
    split = onnx_ir.node("SplitToSequence", [model.graph.inputs[0]], {"axis": 1})
    model.graph.append(split)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (swapped, "makes the skip of down_block_residual_00"),
        (used_twice, "consumers of mid_block_residual"),
        (added_elsewhere, r"consumers of mid_block_residual, and their module: .*'up_blocks\.0'"),
        (renamed, "inputs: the graph has .*'t'"),
        (undeclared, "inputs: the graph has .*'height'"),
        (fixed_size, "a node that cannot work at batch 2, latent 17×33: .*Expand"),
        (doubled, r"shapes at batch 2, latent 17×33: .*\(2, 4, 34, 66\)"),
        (sequence, "operators TensorRT rejects: the graph has .'SplitToSequence'"),
    ],
)
def test_the_exporter_refuses_a_graph_that_is_not_what_the_contract_says(traced, fault, message):
    model, contract = traced
    postconditions.check_graph(model, contract)
    twin = model.clone()
    fault(twin)
    with pytest.raises(postconditions.ExportError, match=message):
        postconditions.check_graph(twin, contract)


def test_the_exporter_refuses_a_controlnet_whose_outputs_are_not_the_contracts(tmp_path):
    with torch.device("meta"):
        contract = probe_controlnet(small.controlnet(small.unet(**SHALLOW)))
    model = onnx_ir.load(onnx_files.plan(tmp_path / "net.onnx", contract))
    parameters_to_inputs(model.graph)
    postconditions.check_graph(model, contract)
    first, third = model.graph.outputs[0], model.graph.outputs[2]
    first.name, third.name = third.name, first.name
    with pytest.raises(postconditions.ExportError, match="shapes at batch 2, latent 17×33"):
        postconditions.check_graph(model, contract)
