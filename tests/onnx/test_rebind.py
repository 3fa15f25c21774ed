"""LoRAs exported as they are merged, and exchanged afterwards: held to PyTorch, where the adapters run beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import exports
import onnx
import pytest
import small
import torch
from click.testing import CliRunner
from loras import add_lora, count_changed

import shapecheck
from shapecheck import Geometry, ShapecheckError, export, rebind
from shapecheck.cli import main
from shapecheck.models import weights
from shapecheck.onnx.file import WEIGHTS_KEY, OnnxFile
from shapecheck.runtime.load import load

pytestmark = pytest.mark.full

ALLOWED = 5e-6
GEOMETRY = Geometry(2, 17, 25)


def build_unet():
    return small.unet(**exports.LEAST)


@pytest.fixture
def plain(tmp_path):
    """A file of the UNet without LoRAs, its checkpoint beside it, of this very process."""
    build_unet().save_pretrained(tmp_path / "model" / "unet")
    return shapecheck.export(str(tmp_path / "model"), tmp_path / "model" / "unet.onnx").path


@pytest.fixture
def unet():
    """The same UNet with two LoRAs, not fused."""
    unet = build_unet()
    add_lora(unet, "one", seed=1)
    add_lora(unet, "two", ("to_q", "conv1"), seed=2)
    unet.set_adapters(["one", "two"], [0.5, 1.25])
    return unet


def difference(path, model, seed=0):
    """The largest difference of a file's image from the model's in PyTorch, as a share of the largest value."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(GEOMETRY.batch, 4, GEOMETRY.height, GEOMETRY.width, generator=generator)
    text = torch.randn(GEOMETRY.batch, 77, model.config.cross_attention_dim, generator=generator)
    timestep = torch.tensor(480)
    with torch.no_grad():
        expected = model(latents, timestep, text).sample
    found = load(path)(latents, timestep, text).sample
    return float((found - expected).abs().max() / expected.abs().max())


def list_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_loaded_loras_are_exported_as_they_draw_and_the_model_stays(unet, tmp_path):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    done = export(unet, tmp_path / "unet.onnx")
    assert (done.weights, count_changed(unet, before)) == ("copy", 0)
    assert difference(done.path, unet) <= ALLOWED
    assert difference(done.path, build_unet()) > 1e-2
    assert OnnxFile(done.path).tensors.keys() == build_unet().state_dict().keys()


def test_another_lora_is_bound_in_each_time_without_tracing(plain, unet, tmp_path, monkeypatch):
    monkeypatch.setattr("shapecheck.onnx.trace_graph.trace", None)
    nodes = onnx.load(plain, load_external_data=False).graph.node
    file, identities = tmp_path / "unet.onnx", set()
    for names, scales in ((["one"], [1.0]), (["one"], [0.5]), (["two"], [1.0]), (["two", "one"], [0.5, 1.5])):
        unet.set_adapters(names, scales)
        done = rebind(plain if not file.exists() else file, unet, file)
        assert difference(file, unet) <= ALLOWED
        assert (done.path, done.weights, done.contract.dtype) == (file, "copy", "float32")
        identities.add(OnnxFile(file).metadata[WEIGHTS_KEY])
        assert weights.digest(OnnxFile(file).tensors) in identities
    assert len(identities) == 4
    unet.fuse_lora(0.75)
    rebind(file, unet)
    assert difference(file, unet) <= ALLOWED
    unet.unload_lora()
    assert difference(file, unet) <= ALLOWED
    assert list(onnx.load(file, load_external_data=False).graph.node) == list(nodes)
    assert difference(plain, build_unet()) <= ALLOWED, "what it was made of stays"


def test_a_controlnet_gets_its_lora_too(tmp_path):
    net = small.controlnet(build_unet())
    done = exports.exported_once(net)
    add_lora(net, "one", seed=3)
    rebind(done.path, net, tmp_path / "net.onnx")
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 4, 8, 9, generator=generator), torch.tensor(480), torch.randn(2, 77, 12, generator=generator)]
    image = torch.rand(2, 3, 64, 72, generator=generator)
    with torch.no_grad():
        downs, mid = net(*given, controlnet_cond=image, return_dict=False)
    others, other = load(tmp_path / "net.onnx")(*given, controlnet_cond=image, return_dict=False)
    for found, expected in zip([*others, other], [*downs, mid], strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) <= ALLOWED
    _, outdated = load(done.path)(*given, controlnet_cond=image, return_dict=False)
    assert float((outdated - mid).abs().max()) > 1e-3


def test_half_precision_stays_and_a_checkpoint_is_linked_where_it_can_be(plain, unet, tmp_path):
    half = exports.exported_once(build_unet(), dtype="float16").path
    rebind(half, unet, tmp_path / "half.onnx")
    assert {tensor.dtype for tensor in OnnxFile(tmp_path / "half.onnx").tensors.values()} == {"float16"}
    merged = unet
    merged.fuse_lora()
    merged.unload_lora()
    other = plain.with_name("other")
    merged.save_pretrained(other / "unet")
    done = rebind(plain, other)
    assert (done.weights, done.contract.header.source) == ("link", "other/unet")
    assert difference(plain, merged) <= ALLOWED
    assert [file.suffix for file in done.files] == [".onnx", ".safetensors"]


def test_what_is_another_graph_is_refused_and_nothing_changes(plain, unet, tmp_path):
    def refuses(model, match, file=plain):
        before = list_files(tmp_path)
        with pytest.raises(ShapecheckError, match=match):
            rebind(file, model)
        assert list_files(tmp_path) == before

    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    refuses(unet, "FreeU is on")
    unet.disable_freeu()
    block = unet.mid_block.resnets[0]
    factor, block.output_scale_factor = block.output_scale_factor, 2.0
    refuses(unet, r"is not the model that .*unet.onnx was made of.*attention processors")
    block.output_scale_factor = factor
    unet.register_forward_hook(lambda *_: None)
    refuses(unet, "may compute something else")
    refuses(small.unet(**exports.LEAST | {"block_out_channels": (16,)}), "is not the model that")
    refuses(small.controlnet(build_unet()), "is of a UNet2DConditionModel, and ControlNetModel is a controlnet")
    rewritten = onnx.load(plain, load_external_data=False)
    folded = next(tensor for tensor in rewritten.graph.initializer if tensor.name.endswith("attn1.to_q.weight"))
    name, folded.name = folded.name, "onnx::MatMul_7"
    for node in rewritten.graph.node:
        node.input[:] = ["onnx::MatMul_7" if value == name else value for value in node.input]
    onnx.save(rewritten, plain.with_name("rewritten.onnx"))
    refuses(build_unet(), rf"not the graph that .*1 weights are no longer in it.*: {name}", plain.with_name("rewritten.onnx"))
    scaled = onnx.load(plain, load_external_data=False)
    scaled.graph.node[0].name = "another"
    onnx.save(scaled, plain.with_name("scaled.onnx"))
    refuses(build_unet(), "not the graph that `shapecheck export` wrote", plain.with_name("scaled.onnx"))


def test_a_disk_that_is_full_leaves_the_file_that_was_there(plain, unet, tmp_path, monkeypatch):
    rebind(plain, unet, tmp_path / "unet.onnx")
    before = list_files(tmp_path)

    def fails(*_, **__):
        raise ShapecheckError("no space left")

    monkeypatch.setattr("shapecheck.models.weights.copy_tensors", fails)
    unet.set_adapters("one")
    with pytest.raises(ShapecheckError, match="no space left"):
        rebind(tmp_path / "unet.onnx", unet)
    assert list_files(tmp_path) == before


def test_the_command_rebinds_and_verifies(plain, unet, tmp_path):
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path / "fused" / "unet")
    command = ["rebind", str(plain), "--model", str(tmp_path / "fused"), "-o", str(tmp_path / "new.onnx"), "--verify"]
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "REBOUND: PyTorch and ONNX Runtime agree")
    result = CliRunner().invoke(main, [*command[:-1], "--format", "json"])
    record = json.loads(result.stdout)
    assert (record["verified"], record["weights"]) == (None, "link")
