"""Exported files against PyTorch in ONNX Runtime: right at every size, with the checkpoint's own weights."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from pathlib import Path

import onnx
import onnx_ir
import pytest
import small
import torch
from comparison import difference, given_to, inputs_for, session, with_onnx, with_torch
from diffusers import UNet2DConditionModel
from small import SHALLOW, TINY

from shapecheck import Geometry, ShapecheckError, export, probe, read_contract
from shapecheck.build import graph, postconditions

SIZES = [Geometry(1, 8, 8), Geometry(2, 17, 25), Geometry(3, 33, 41, 5), Geometry(2, 9, 10, 1), Geometry(1, 16, 24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as diffusers saves it."""
    folder = tmp_path_factory.mktemp("model")
    small.unet(**SHALLOW).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The same with the smallest model."""
    folder = tmp_path_factory.mktemp("tiny")
    small.unet(**TINY).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def traces():
    """The graphs traced so far, each as the exporter checks it, before its weights are bound."""
    return []


@pytest.fixture(scope="module")
def linked(folder, traces):
    def keep(module, contract, opset):
        made = trace(module, contract, opset)
        traces.append((made.clone(), contract))
        return made

    trace = graph.trace_unet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "trace_unet", keep)
        return export(str(folder), folder / "unet.onnx")


def test_a_linked_file_is_right_at_every_size(folder, linked):
    assert (linked.weights, linked.reason, linked.dtype, linked.opset) == ("link", "", "float32", 20)
    assert linked.files == (folder / "unet.onnx", folder / "unet" / "diffusion_pytorch_model.safetensors")
    unet, runtime = small.unet(**SHALLOW), session(linked.path)
    for geometry in SIZES:
        given = inputs_for(linked.contract, geometry)
        (found,) = with_onnx(runtime, given)
        assert difference(found, with_torch(unet, linked.contract, given)) <= 2e-6, geometry


def test_its_inputs_are_the_contracts_and_every_one_acts(linked):
    runtime = session(linked.path)
    geometry = Geometry(2, 13, 21)
    contract = linked.contract
    declared = [(each.name, [str(size) for size in each.shape]) for each in runtime.get_inputs()]
    rules = {each.name: each.shape for each in contract.inputs} | {slot.name: slot.shape for slot in contract.slots}
    assert declared == [(name, list(map(str, shape))) for name, shape in rules.items()]
    given = inputs_for(contract, geometry)
    (plain,) = with_onnx(runtime, given)
    effects = set()
    for name in rules:
        changed = given | {name: given[name] + (100 if name == "timestep" else 0.5)}
        (found,) = with_onnx(runtime, changed)
        effects.add(round(difference(found, plain), 7))
        assert difference(found, plain) > 1e-5, name
    assert len(effects) == len(rules)


def test_it_carries_its_contract(linked):
    assert read_contract(linked.path) == linked.contract
    metadata = {each.key: each.value for each in onnx.load(linked.path, load_external_data=False).metadata_props}
    assert metadata["shapecheck.digest"] == linked.contract.digest
    assert metadata["shapecheck.sizes"] == "any"
    assert metadata["shapecheck.weights"].startswith("sha256:")
    assert json.loads(metadata["shapecheck.versions"]).keys() >= {"shapecheck", "torch", "onnx"}


def test_it_says_nothing_of_the_machine_it_was_made_on(linked):
    assert os.fsencode(Path(torch.__file__).parent) not in linked.path.read_bytes()
    onnx.checker.check_model(str(linked.path), full_check=True)


def test_linking_leaves_the_checkpoint_as_it_was_and_writes_little(folder, linked):
    again = small.unet(**SHALLOW)
    checkpoint = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    again.save_pretrained(folder.parent / f"{folder.name}-twin")
    twin = folder.parent / f"{folder.name}-twin" / "diffusion_pytorch_model.safetensors"
    assert hashlib.sha256(twin.read_bytes()).hexdigest() == before
    tensors = onnx.load(linked.path, load_external_data=False).graph.initializer
    places = {each.value for tensor in tensors for each in tensor.external_data if each.key == "location"}
    assert places == {"unet/diffusion_pytorch_model.safetensors"}
    assert sum(len(tensor.raw_data) for tensor in tensors) < 4096


@pytest.mark.full
def test_weights_are_copied_where_they_cannot_be_linked_and_in_another_precision(tmp_path):
    """SDXL in half precision: PyTorch joins text_embeds with an embedding that it computed in float32."""
    model = small.unet(**TINY | small.TEXT_TIME)
    model.save_pretrained(tmp_path / "model" / "unet")
    (tmp_path / "out").mkdir()
    source, output = str(tmp_path / "model"), tmp_path / "out" / "half.onnx"
    done = export(source, output, dtype="float16", naming="streamdiffusion", opset=23)
    assert (done.weights, done.reason) == ("copy", "the checkpoint is float32 and the graph float16")
    assert sorted(each.name for each in output.parent.iterdir()) == ["half.onnx", "half.onnx.data"]
    runtime = session(done.path)
    names = [each.name for each in runtime.get_inputs()]
    assert names[:6] == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "input_control_00"]
    assert names[-1] == "input_control_middle"
    given = inputs_for(done.contract, Geometry(2, 17, 25), dtype=torch.float16)
    expected = with_torch(model, done.contract, {name: value.float() for name, value in given.items()})
    theirs = dict(zip(names[5:], [slot.name for slot in done.contract.slots], strict=True))
    (found,) = with_onnx(runtime, given | {name: given[ours] for name, ours in theirs.items()})
    own = difference(with_torch(copy.deepcopy(model).half(), done.contract, given), expected)
    assert difference(found, expected) <= 2 * own


@pytest.mark.full
def test_a_live_module_that_differs_from_its_checkpoint_is_copied_and_not_linked(tiny, tmp_path):
    live = UNet2DConditionModel.from_pretrained(tiny / "unet")
    with torch.no_grad():
        live.conv_in.weight += 0.25  # as a fused LoRA does
    with pytest.raises(ShapecheckError, match=r"--weights link: the live module differs.* in 1 tensors, first conv_in.weight"):
        export(live, tiny / "live.onnx", weights="link")
    done = export(live, tiny / "live.onnx", control=False)
    assert done.weights == "copy"
    assert "fused LoRA" in done.reason
    runtime = session(done.path)
    assert [each.name for each in runtime.get_inputs()] == ["sample", "timestep", "encoder_hidden_states"]
    given = inputs_for(done.contract, Geometry(1, 9, 14))
    assert difference(with_onnx(runtime, given)[0], with_torch(live, done.contract, given)) <= 2e-6


@pytest.mark.full
def test_a_controlnet_has_one_output_a_slot_and_a_live_strength(tmp_path):
    net = small.controlnet(small.unet(**TINY))
    net.save_pretrained(tmp_path / "controlnet")
    done = export(str(tmp_path / "controlnet"), tmp_path / "controlnet.onnx")
    runtime = session(done.path)
    outputs = [each.name for each in runtime.get_outputs()]
    assert outputs == [slot.name for slot in probe(small.unet(**TINY)).slots]
    for geometry, strength in ((Geometry(2, 17, 25), 0.75), (Geometry(1, 8, 12, 3), 1.5)):
        given = inputs_for(done.contract, geometry) | {"conditioning_scale": torch.tensor([strength])}
        with torch.no_grad():
            downs, mid = net(**given_to(done.contract, given), return_dict=False)
        for found, expected in zip(with_onnx(runtime, given), [*downs, mid], strict=True):
            assert difference(found, expected.numpy()) <= 2e-6


@pytest.mark.full
def test_structure_alone_needs_no_checkpoint(tmp_path):
    small.unet(**TINY).save_config(tmp_path / "unet")
    with pytest.raises(ShapecheckError, match=r"no weights for .*there are no weights beside .*; give .*, or --weights none"):
        export(str(tmp_path / "unet"), tmp_path / "unet.onnx")
    done = export(str(tmp_path / "unet"), tmp_path / "unet.onnx", weights="none")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["unet", "unet.onnx"]
    model = onnx.load(done.path, load_external_data=False)
    places = [
        {each.key: each.value for each in tensor.external_data} for tensor in model.graph.initializer if tensor.external_data
    ]
    assert {place["location"] for place in places} == {"unet.onnx.data"}
    ends = [int(place["offset"]) + int(place["length"]) for place in places]
    starts = [int(place["offset"]) for place in places]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


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


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    small.unet(**SHALLOW).save_pretrained(tmp_path / "unet")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 20}), encoding="utf-8")
    with pytest.raises(ShapecheckError, match=r"attn2\.to_k\.weight"):
        export(str(tmp_path), tmp_path / "unet.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["unet"]


def test_the_values_that_later_parts_look_for_are_those_of_the_modules_in_their_names(linked, folder, tmp_path):
    unet, contract = small.unet(**SHALLOW), linked.contract
    model = onnx.load(linked.path, load_external_data=False)
    blocks = ["mid_block", *(f"up_blocks.{number}" for number in range(len(unet.up_blocks)))]
    parts = [name for name, _ in unet.named_modules() if re.fullmatch(r"conv_in|down_blocks\.\d+\.\w+\.\d+", name)]
    assert {slot.producer for slot in contract.slots} <= {*parts, *blocks}
    names = [f"{module}.out" for module in (*parts, *blocks)]
    sums = [f"{slot.producer}.out+{slot.name}" for slot in contract.slots]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (*names, *sums))
    onnx.save(model, folder / "watched.onnx")
    seen = {}
    for path in (*parts, *blocks):
        hook = lambda module, given, result, path=path: seen.update({path: result})  # noqa: E731
        unet.get_submodule(path).register_forward_hook(hook)
    given = inputs_for(contract, Geometry(2, 17, 25))
    with_torch(unet, contract, given)
    found = dict(zip([*names, *sums], with_onnx(session(folder / "watched.onnx"), given)[1:], strict=True))
    for name in names:
        result = seen[name.rpartition(".")[0]]
        expected = (result[0] if isinstance(result, tuple) else result).numpy()
        assert difference(found[name], expected) <= 2e-6, name
    for slot, total in zip(contract.slots, sums, strict=True):
        assert difference(found[total], found[f"{slot.producer}.out"] + given[slot.name].numpy()) <= 1e-6, total


@pytest.fixture(scope="module")
def traced(linked, traces):
    """The graph and the contract it is checked against."""
    return traces[0]


def swapped(model):
    """Two slots of one shape exchanged: no shape can show it."""
    first, second = (next(each for each in model.graph.inputs if each.name == f"down_block_residual_0{at}") for at in (0, 1))
    (one,), (other,) = list(first.uses()), list(second.uses())
    one.node.replace_input_with(one.idx, second)
    other.node.replace_input_with(other.idx, first)


def used_twice(model):
    residual = next(each for each in model.graph.inputs if each.name == "mid_block_residual")
    model.graph.append(onnx_ir.node("Neg", [residual]))


def renamed(model):
    model.graph.inputs[1].name = "t"


def undeclared(model):
    model.graph.inputs[3].shape = onnx_ir.Shape(["batch", 8, "height", "w"])


def fixed_size(model):
    """As where a size was taken for a constant: right at the traced size only."""
    node = next(each for each in model.graph if each.op_type == "Resize")
    node.replace_input_with(3, onnx_ir.val("sizes", const_value=onnx_ir.tensor([2, 16, 9, 13])))
    model.graph.register_initializer(node.inputs[3])


def sequence(model):
    split = onnx_ir.node("SplitToSequence", [model.graph.inputs[0]], {"axis": 1})
    model.graph.append(split)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (swapped, "makes the skip of down_block_residual_00"),
        (used_twice, "consumers of mid_block_residual"),
        (renamed, "inputs: the graph has .*'t'"),
        (undeclared, "inputs: the graph has .*'height'"),
        (fixed_size, "a node that cannot work at batch 2, latent 17×33: .*Concat"),
        (sequence, "operators TensorRT rejects: the graph has .'SplitToSequence'"),
    ],
)
def test_the_exporter_refuses_a_graph_that_is_not_what_the_contract_says(traced, fault, message):
    model, contract = traced
    postconditions.check(model, contract)
    twin = model.clone()
    fault(twin)
    with pytest.raises(postconditions.ExportError, match=message):
        postconditions.check(twin, contract)


@pytest.mark.full
def test_bfloat16_is_written_as_such(folder, tmp_path):
    done = export(str(folder), tmp_path / "unet.onnx", dtype="bfloat16")
    model = onnx.load(done.path)
    assert {each.data_type for each in model.graph.initializer if each.name.endswith("weight")} == {onnx.TensorProto.BFLOAT16}
    onnx.checker.check_model(str(done.path), full_check=True)
    kernel = next(each for each in model.graph.initializer if each.name == "conv_in.weight")
    stored = torch.frombuffer(bytearray(kernel.raw_data), dtype=torch.bfloat16).reshape(tuple(kernel.dims))
    assert torch.equal(stored, small.unet(**SHALLOW).conv_in.weight.detach().bfloat16())
