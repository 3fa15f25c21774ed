"""Files that shapecheck exports, against PyTorch in ONNX Runtime: right at every size, with the checkpoint's own weights."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import exports
import onnx
import pytest
import small
import torch
from comparison import difference, given_to, inputs_for, session, with_onnx, with_torch
from diffusers import UNet2DConditionModel
from exports import LEAST
from onnx_files import check
from small import SHALLOW, TINY

from shapecheck import Geometry, ShapecheckError, export, load, probe, read_contract
from shapecheck.contract import show

pytestmark = pytest.mark.full

SIZES = [Geometry(1, 8, 8), Geometry(2, 17, 25), Geometry(3, 33, 41, 5), Geometry(2, 9, 10, 1), Geometry(1, 16, 24)]


@pytest.fixture(scope="module")
def linked():
    """A UNet of two levels whose file points into its checkpoint."""
    return exports.exported_once(small.unet(**SHALLOW))


@pytest.fixture(scope="module")
def folder(linked):
    """Its model folder as diffusers saves it, the file in it."""
    return linked.path.parent


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
    assert read_contract(linked.path) == linked.contract == probe(small.unet(**SHALLOW))
    metadata = {each.key: each.value for each in onnx.load(linked.path, load_external_data=False).metadata_props}
    assert metadata["shapecheck.digest"] == linked.contract.digest
    assert metadata["shapecheck.sizes"] == "any"
    assert metadata["shapecheck.weights"].startswith("sha256:")
    assert json.loads(metadata["shapecheck.versions"]).keys() >= {"shapecheck", "torch", "onnx"}


def test_it_says_nothing_of_the_machine_it_was_made_on(folder, linked):
    content = linked.path.read_bytes()
    assert os.fsencode(Path(torch.__file__).parent) not in content
    assert os.fsencode(folder.parent) not in content
    assert linked.contract.header.source == f"{folder.name}/unet"
    onnx.checker.check_model(str(linked.path), full_check=True)


def test_check_finds_it_fine_and_needs_no_model(linked):
    checked = check(linked.path)
    assert checked.mismatches == ()
    assert (checked.basis, checked.contract, checked.naming) == ("inside", linked.contract, "shapecheck")
    assert checked.limits.divisor == 1
    assert [(each.name, each.skip, each.producer) for each in checked.slots] == [
        (slot.name, show(slot.skip), slot.producer) for slot in linked.contract.slots
    ]


def test_linking_leaves_the_checkpoint_as_it_was_and_writes_little(folder, linked, tmp_path):
    checkpoint = folder / "unet" / "diffusion_pytorch_model.safetensors"
    small.unet(**SHALLOW).save_pretrained(tmp_path / "twin")
    twin = tmp_path / "twin" / "diffusion_pytorch_model.safetensors"
    assert hashlib.sha256(twin.read_bytes()).digest() == hashlib.sha256(checkpoint.read_bytes()).digest()
    tensors = onnx.load(linked.path, load_external_data=False).graph.initializer
    places = {each.value for tensor in tensors for each in tensor.external_data if each.key == "location"}
    assert places == {"unet/diffusion_pytorch_model.safetensors"}
    assert sum(len(tensor.raw_data) for tensor in tensors) < 4096


def test_the_values_that_later_parts_look_for_are_those_of_the_modules_in_their_names(linked, folder, tmp_path):
    unet, contract = small.unet(**SHALLOW), linked.contract
    model = onnx.load(linked.path, load_external_data=False)
    blocks = ["mid_block", *(f"up_blocks.{number}" for number in range(len(unet.up_blocks)))]
    parts = [name for name, _ in unet.named_modules() if re.fullmatch(r"conv_in|down_blocks\.\d+\.\w+\.\d+", name)]
    assert {slot.producer for slot in contract.slots} <= {*parts, *blocks}
    names = [f"{module}.out" for module in (*parts, *blocks)]
    sums = [f"{slot.producer}.out+{slot.name}" for slot in contract.slots]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (*names, *sums))
    shutil.copytree(folder / "unet", tmp_path / "unet")
    onnx.save(model, tmp_path / "watched.onnx")
    seen = {}
    for path in (*parts, *blocks):
        hook = lambda module, given, result, path=path: seen.update({path: result})  # noqa: E731
        unet.get_submodule(path).register_forward_hook(hook)
    given = inputs_for(contract, Geometry(2, 17, 25))
    with_torch(unet, contract, given)
    found = dict(zip([*names, *sums], with_onnx(session(tmp_path / "watched.onnx"), given)[1:], strict=True))
    for name in names:
        result = seen[name.rpartition(".")[0]]
        expected = (result[0] if isinstance(result, tuple) else result).numpy()
        assert difference(found[name], expected) <= 2e-6, name
    for slot, total in zip(contract.slots, sums, strict=True):
        assert difference(found[total], found[f"{slot.producer}.out"] + given[slot.name].numpy()) <= 1e-6, total


def test_weights_are_copied_where_they_cannot_be_linked_and_in_another_precision(tmp_path):
    """SDXL in half precision: PyTorch joins text_embeds with an embedding that it computed in float32."""
    model = small.unet(**LEAST | small.TEXT_TIME)
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


def test_a_live_module_that_differs_from_its_checkpoint_is_copied_and_not_linked(tmp_path):
    small.unet(**LEAST).save_pretrained(tmp_path / "unet")
    live = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        live.conv_in.weight += 0.25  # as a fused LoRA does
    with pytest.raises(ShapecheckError, match=r"--weights link: the live module differs.* in 1 tensors, first conv_in.weight"):
        export(live, tmp_path / "live.onnx", weights="link")
    done = export(live, tmp_path / "live.onnx", control=False)
    assert done.weights == "copy"
    assert "fused LoRA" in done.reason
    runtime = session(done.path)
    assert [each.name for each in runtime.get_inputs()] == ["sample", "timestep", "encoder_hidden_states"]
    given = inputs_for(done.contract, Geometry(1, 9, 14))
    assert difference(with_onnx(runtime, given)[0], with_torch(live, done.contract, given)) <= 2e-6


@pytest.mark.parametrize(
    ("naming", "base", "image", "condition", "emitted"),
    [
        ("streamdiffusion", ["sample", "timestep", "encoder_hidden_states"], "latent", "controlnet_cond",
         ["down_block_00", "down_block_01", "mid_block"]),
        ("comfyui", ["x", "timesteps", "context"], "h", "hint", ["output_control_0", "output_control_1", "middle_control_0"]),
    ],
)  # fmt: skip
def test_a_whole_file_has_another_projects_names_and_is_served_by_roles(naming, base, image, condition, emitted):
    """Both models as PyTorch computes them, called as diffusers calls them."""
    unet = small.unet(**LEAST)
    net = small.controlnet(unet)
    sample, text, picture = torch.randn(2, 4, 17, 25), torch.randn(2, 9, 12), torch.rand(2, 3, 136, 200)
    done, done_net = exports.exported_once(unet, naming=naming), exports.exported_once(net, naming=naming)
    runtime, runtime_net = session(done.path), session(done_net.path)
    assert [each.name for each in runtime.get_inputs()][:3] == base
    assert [each.name for each in runtime.get_outputs()] == [image]
    assert [each.name for each in runtime_net.get_inputs()] == [*base, condition, "conditioning_scale"]
    assert [each.name for each in runtime_net.get_outputs()] == emitted
    with torch.no_grad():
        downs, mid = net(sample, 300, text, picture, return_dict=False)
        expected = unet(sample, 300, text, down_block_additional_residuals=downs, mid_block_additional_residual=mid).sample
    own_downs, own_mid = load(done_net.path, "ort")(sample, 300, text, picture, return_dict=False)
    for own, theirs in zip((*own_downs, own_mid), (*downs, mid), strict=True):
        assert difference(own.numpy(), theirs.numpy()) <= 2e-6
    found = load(done.path, "ort")(
        sample, 300, text, down_block_additional_residuals=own_downs, mid_block_additional_residual=own_mid
    ).sample
    assert difference(found.numpy(), expected.numpy()) <= 5e-6
    for path in (done.path, done_net.path):
        assert not check(path).mismatches


def test_a_controlnet_has_one_output_a_slot_and_a_live_strength():
    net = small.controlnet(small.unet(**TINY))
    done = exports.exported_once(net)
    checked = check(done.path)
    assert (checked.basis, checked.contract, checked.mismatches) == ("inside", done.contract, ())
    runtime = session(done.path)
    outputs = [each.name for each in runtime.get_outputs()]
    assert outputs == [slot.name for slot in probe(small.unet(**TINY)).slots]
    for geometry, strength in ((Geometry(2, 17, 25), 0.75), (Geometry(1, 8, 12, 3), 1.5)):
        given = inputs_for(done.contract, geometry) | {"conditioning_scale": torch.tensor([strength])}
        with torch.no_grad():
            downs, mid = net(**given_to(done.contract, given), return_dict=False)
        for found, expected in zip(with_onnx(runtime, given), [*downs, mid], strict=True):
            assert difference(found, expected.numpy()) <= 2e-6


def test_the_residuals_of_a_controlnet_in_half_precision_double_with_its_strength():
    done = exports.exported_once(small.controlnet(small.unet(**TINY)), dtype="float16")
    assert done.dtype == "float16"
    runtime = session(done.path)
    assert {each.type for each in runtime.get_outputs()} == {"tensor(float16)"}
    given = inputs_for(done.contract, Geometry(2, 17, 25), dtype=torch.float16)
    single, double = (
        with_onnx(runtime, given | {"conditioning_scale": torch.tensor([strength], dtype=torch.float16)})
        for strength in (1.0, 2.0)
    )
    assert len(single) == len(done.contract.slots) == 3
    for one, other in zip(single, double, strict=True):
        assert difference(other, 2 * one) <= 1e-6  # doubling rounds nothing; residuals of zero would give NaN


def test_structure_alone_needs_no_checkpoint(tmp_path):
    small.unet(**LEAST).save_config(tmp_path / "unet")
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


def test_bfloat16_is_written_as_such(tmp_path):
    unet = small.unet(**LEAST)
    unet.save_pretrained(tmp_path / "model" / "unet")
    done = export(str(tmp_path / "model"), tmp_path / "unet.onnx", dtype="bfloat16")
    model = onnx.load(done.path)
    assert {each.data_type for each in model.graph.initializer if each.name.endswith("weight")} == {onnx.TensorProto.BFLOAT16}
    onnx.checker.check_model(str(done.path), full_check=True)
    kernel = next(each for each in model.graph.initializer if each.name == "conv_in.weight")
    stored = torch.frombuffer(bytearray(kernel.raw_data), dtype=torch.bfloat16).reshape(tuple(kernel.dims))
    assert torch.equal(stored, unet.conv_in.weight.detach().bfloat16())
