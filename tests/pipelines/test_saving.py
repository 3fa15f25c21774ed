"""Pipelines with sessions in them: saved and loaded again, made from one another, copied, moved and offloaded.

The pictures are compared with those of the same pipeline in PyTorch.
"""

from __future__ import annotations

import copy
import json
import pickle  # noqa: TID251  # of its own bytes
from pathlib import Path

import engines
import numpy as np
import pytest
import real_pipelines
import small
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
)

import shapecheck
from shapecheck import ShapecheckError
from shapecheck.onnx import export as exporter
from shapecheck.pipelines.tiny_pipeline import build_controlnet
from shapecheck.runtime.dropin import DropIn
from shapecheck.runtime.dropin_controlnet import DropInControlNet
from shapecheck.runtime.dropin_unet import DropInUNet

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"num_inference_steps": 2}
ALLOWED = 1e-4
SEEN = 2 / 255


def build(*, several=False):
    """Return a pipeline with a UNet and one ControlNet or two, in PyTorch, all its own."""
    parts = copy.deepcopy(real_pipelines.take_parts("shallow"))
    net = MultiControlNetModel([parts.controlnet, build_controlnet(parts.unet, 7)]) if several else None
    return real_pipelines.PIPELINES["controlnet"](parts, controlnet=net)


def exchange(pipe):
    """Put sessions in the places of the UNet and the ControlNets; they compute in PyTorch, which takes no export."""
    pipe.unet = shapecheck.load(pipe.unet, "torch")
    if isinstance(pipe.controlnet, MultiControlNetModel):
        pipe.controlnet = MultiControlNetModel([shapecheck.load(net, "torch") for net in pipe.controlnet.nets])
    else:
        pipe.controlnet = shapecheck.load(pipe.controlnet, "torch")
    return pipe


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = real_pipelines.new_scheduler("ddim")
    if isinstance(pipe.controlnet, MultiControlNetModel):
        image = [make(real_pipelines.HEIGHT, real_pipelines.WIDTH) for make in (real_pipelines.rings, real_pipelines.waves)]
        options = {"image": image, "controlnet_conditioning_scale": [0.7, 0.4]} | options
    return real_pipelines.images(pipe, **SHORT, **options)


def assert_alike(one, other, allowed=ALLOWED):
    assert one.std() > 10 / 255  # no grey plane
    assert np.abs(one - other).max() <= allowed


def read_folder(folder):
    """Return every file's bytes, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def load_again(folder):
    return StableDiffusionControlNetPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


@pytest.fixture
def quick_export(monkeypatch):
    """The exporter is torch's older one."""
    monkeypatch.setattr(exporter, "export", engines.exported_quickly)


@pytest.mark.full
def test_an_accelerated_pipeline_is_saved_over_its_own_folder_and_loads_again(tmp_path, quick_export):
    pipe = build()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    before = read_folder(tmp_path / "saved")
    with shapecheck.accelerate(pipe, tmp_path / "engines", "ort", fallback="error"):
        assert isinstance(pipe.unet, DropInUNet)
        pipe.save_pretrained(tmp_path / "saved")
        assert_alike(draw(pipe), expected)
    assert read_folder(tmp_path / "saved") == before
    assert_alike(draw(load_again(tmp_path / "saved")), expected)


def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path):
    """The VAE and others come before the UNet, and nobody asked it."""
    pipe = build()
    pipe.save_pretrained(tmp_path / "saved")
    before = read_folder(tmp_path / "saved")
    pipe.unet = shapecheck.load(real_pipelines.export_unet("shallow"), "ort")  # whose exporter renames weights
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.zero_()
    for folder in (tmp_path / "saved", tmp_path / "new"):
        with pytest.raises(
            ShapecheckError, match=r"save_pretrained: the UNet2DConditionModel in PyTorch .*unet\.onnx does not hold"
        ):
            pipe.save_pretrained(folder)
    assert read_folder(tmp_path / "saved") == before
    assert not (tmp_path / "new").exists()
    pipe.unet = shapecheck.load(real_pipelines.export_unet("shallow"), "ort", model=str(tmp_path / "saved"))
    pipe.save_pretrained(tmp_path / "saved")
    after = read_folder(tmp_path / "saved")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"vae/diffusion_pytorch_model.safetensors", "unet/config.json"}  # which names its folder now


@pytest.mark.full
def test_one_of_several_controlnets_that_cannot_be_saved_is_said_too(tmp_path):
    pipe = build(several=True)
    first, second = pipe.controlnet.nets
    opened = shapecheck.load(second, "torch")
    pipe.controlnet = MultiControlNetModel([first, DropInControlNet(opened.engine)])
    with pytest.raises(
        ShapecheckError, match=r"save_pretrained: the ControlNetModel in PyTorch .* not known: its session was not"
    ):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.full
@pytest.mark.parametrize("several", [False, True])
def test_a_pipeline_is_saved_with_one_controlnet_or_several(tmp_path, several):
    pipe = exchange(build(several=several))
    expected = draw(build(several=several))
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="1MB")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["controlnet"] == ["diffusers", "MultiControlNetModel" if several else "ControlNetModel"]
    again = StableDiffusionControlNetPipeline.from_pretrained(tmp_path, variant="fp16", safety_checker=None)
    assert not any(isinstance(model, DropIn) for model in (again.unet, *getattr(again.controlnet, "nets", [again.controlnet])))
    assert_alike(draw(again), expected)
    kept = StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path, variant="fp16", safety_checker=None, unet=pipe.unet, controlnet=pipe.controlnet
    )
    assert kept.unet is pipe.unet
    assert_alike(draw(kept), expected)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "dtype", "weights"), [("unet", torch.float16, "copy"), ("controlnet", torch.float32, "embed")]
)
def test_our_files_hold_the_weights_and_the_configuration_that_are_saved(tmp_path, kind, dtype, weights):
    """Without the model, whether the weights are beside the file or within."""
    unet = small.unet(**small.TINY)
    model = (unet if kind == "unet" else small.controlnet(unet)).to(dtype)
    shapecheck.export(model, tmp_path / "model.onnx", weights=weights)
    shapecheck.load(tmp_path / "model.onnx", "ort").save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "theirs")
    theirs = type(model).from_pretrained(tmp_path / "theirs")
    assert dict(again.config) | {"_name_or_path": ""} == dict(theirs.config) | {"_name_or_path": ""}


MAKE = {
    "from_pipe": lambda pipe: StableDiffusionControlNetPipeline.from_pipe(
        StableDiffusionControlNetImg2ImgPipeline.from_pipe(pipe)
    ),
    "AutoPipeline.from_pipe": lambda pipe: StableDiffusionControlNetPipeline.from_pipe(
        AutoPipelineForImage2Image.from_pipe(pipe)
    ),
    "components": lambda pipe: StableDiffusionControlNetPipeline(**pipe.components, requires_safety_checker=False),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


@pytest.mark.full
def test_a_pipeline_is_made_from_another():
    pipe = exchange(build())
    expected = draw(build())
    for name, make in MAKE.items():
        made = make(pipe)
        assert isinstance(made.unet, DropIn)
        assert isinstance(made.controlnet, DropIn)
        assert (made.unet is pipe.unet) == (name not in ("deepcopy", "pickle"))
        assert_alike(draw(made), expected)


def do(name, *arguments, **options):
    return lambda pipe: getattr(pipe, name)(*arguments, **options)


CPU = torch.device("cpu")  # hooks act the same with a GPU in its place
PIPELINE_METHODS = {
    "enable_model_cpu_offload": do("enable_model_cpu_offload", device="cpu"),
    "group offload by blocks": do("enable_group_offload", onload_device=CPU, num_blocks_per_group=1),
    "group offload by leaves": do("enable_group_offload", onload_device=CPU, offload_type="leaf_level"),
    "remove_all_hooks": lambda pipe: (pipe.enable_model_cpu_offload(device="cpu"), pipe.remove_all_hooks()),
    "sequential and back": lambda pipe: (pipe.enable_sequential_cpu_offload(device="cpu"), pipe.remove_all_hooks()),
    "reset_device_map": do("reset_device_map"),
    "vae": lambda pipe: (pipe.vae.enable_slicing(), pipe.vae.enable_tiling()),
    "enable_attention_slicing": do("enable_attention_slicing"),
    "disable_attention_slicing": do("disable_attention_slicing"),
    "disable_xformers": do("disable_xformers_memory_efficient_attention"),
    "disable_freeu": do("disable_freeu"),
    "unload_lora_weights": do("unload_lora_weights"),
    "unfuse_lora": do("unfuse_lora"),
    "get_list_adapters": do("get_list_adapters"),
    "to cpu": do("to", "cpu"),
    "to float32": do("to", dtype=torch.float32),
    "half and back": lambda pipe: pipe.unet.half().float(),
}
REFUSED = {
    "enable_freeu": do("enable_freeu", 0.9, 0.2, 1.2, 1.4),
    "fuse_qkv_projections": do("fuse_qkv_projections"),
    "fuse_lora": do("fuse_lora"),
    "add_adapter": lambda pipe: pipe.unet.add_adapter(None),
    "disable_lora": do("disable_lora"),
    "down_blocks": do("set_ip_adapter_scale", 0.5),
    "attn_processors": do("unload_ip_adapter"),
}


@pytest.mark.full
def test_a_pipelines_methods_work_beside_a_session():
    expected = draw(build())
    for call in PIPELINE_METHODS.values():
        pipe = exchange(build())
        call(pipe)
        assert_alike(draw(pipe), expected)
        assert isinstance(pipe.unet, DropIn)


@pytest.mark.full
def test_what_a_session_cannot_do_a_pipeline_refuses_by_name():
    pipe = exchange(build())
    expected = draw(pipe)
    for name, call in REFUSED.items():
        with pytest.raises(ShapecheckError, match=f"^{name}: "):
            call(pipe)
    assert_alike(draw(pipe), expected)


@pytest.mark.full
def test_sequential_offloading_moves_nothing_of_a_session():
    """diffusers' whole pipeline with the text encoders of today is refused by `accelerate`, in PyTorch as well."""
    offload = pytest.importorskip("accelerate").cpu_offload
    pipe = exchange(build())
    expected = draw(pipe)
    for model in (pipe.unet, pipe.controlnet, pipe.vae):
        offload(model, CPU, offload_buffers=True)
    assert_alike(draw(pipe), expected)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_changes_its_precision_whole(dtype):
    pipe, theirs = exchange(build()), build()
    expected = draw(theirs)
    pipe.to(dtype)
    assert {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")} == {dtype}
    theirs.to(dtype)
    assert np.abs(draw(pipe) - expected).max() <= np.abs(draw(theirs) - expected).max() + SEEN


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_pipeline_is_moved_and_offloaded_wherever_its_sessions_run(device):
    expected = draw(build())
    moves = {
        "to the GPU": do("to", "cuda"),
        "there and back": lambda pipe: pipe.to("cuda").to("cpu"),
        "enable_model_cpu_offload": do("enable_model_cpu_offload"),
        "group offload": do("enable_group_offload", onload_device=torch.device("cuda"), offload_type="leaf_level"),
    }
    for name, move in moves.items():
        pipe = build()
        pipe.unet, pipe.controlnet = (shapecheck.load(net.to(device), "torch") for net in (pipe.unet, pipe.controlnet))
        move(pipe)
        found = draw(pipe)
        assert np.abs(found - expected).max() <= SEEN, name
        assert str(pipe.unet.engine.device).startswith(device)
