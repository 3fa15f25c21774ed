"""A pipeline's UNet exchanged in one call, and put back. The exporter is torch's older one where a test is not of exporting."""

from __future__ import annotations

import logging
import re
import shutil
from types import SimpleNamespace

import engines
import numpy as np
import pytest
import real_pipelines as pipes
import torch
from diffusers import MultiControlNetModel
from diffusers.models.attention_processor import AttnProcessor

import shapecheck
from shapecheck import ContractError, ShapecheckError
from shapecheck.contract.environment import Backend, Gap
from shapecheck.pipelines import accelerate as road
from shapecheck.pipelines import made as files
from shapecheck.pipelines import small as parts_of
from shapecheck.run.dropin_unet import DropInUNet

ALLOWED = 1 / 255
SHORT = {"num_inference_steps": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts():
    return parts_of.parts("sd15")


@pytest.fixture(scope="module")
def contract(parts):
    return shapecheck.probe(parts.unet)


@pytest.fixture
def pipe(parts):
    return pipes.PIPELINES["controlnet"](parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(autouse=True)
def exports(monkeypatch, tmp_path_factory):
    """What was exported. It stands in for our exporter, which takes a minute; the README's `shapecheck demo` uses that."""
    done = []

    def quick(unet, path, *, weights, progress):
        place = tmp_path_factory.getbasetemp() / path.name
        if not place.exists():
            engines.exported_quickly(unet, place, weights=weights, progress=progress)
        for name in (path.name, f"{path.name}.data"):
            shutil.copy(place.with_name(name), path.with_name(name))
        done.append(path)

    monkeypatch.setattr(files, "export", quick)
    return done


@pytest.fixture
def no_gpu(caplog):
    caplog.set_level(logging.INFO, "shapecheck")
    return caplog


def test_a_pipeline_gives_the_same_images_and_gets_its_unet_back(pipe, parts, folder, no_gpu):
    torch_images = pipes.images(pipe, **SHORT)
    done = shapecheck.accelerate(pipe, folder, "ort")
    assert (done.backend, done.unet, done.refusals) == ("ort", pipe.unet, ())
    assert isinstance(pipe.unet, DropInUNet)
    assert no_gpu.messages[-1] == f"ort runs the UNet: {done.artefact}"
    images = pipes.images(pipe, **SHORT)
    assert np.abs(images - torch_images).max() <= ALLOWED
    assert not np.array_equal(images, pipes.images(pipe, **SHORT, controlnet_conditioning_scale=0.5))
    session = pipe.unet
    done()
    done()
    assert pipe.unet is parts.unet is done.unet
    assert (done.backend, done.artefact) == ("torch", None)
    assert np.array_equal(pipes.images(pipe, **SHORT), torch_images)
    with pytest.raises(ShapecheckError, match="closed"):
        session(torch.zeros(1, 4, 9, 13), 1, torch.zeros(1, 77, 32))


def test_a_block_puts_it_back_even_when_it_fails(pipe, parts, folder):
    with pytest.raises(ZeroDivisionError), shapecheck.accelerate(pipe, folder, "ort"):
        assert isinstance(pipe.unet, DropInUNet)
        1 / 0  # noqa: B018
    assert pipe.unet is parts.unet


def test_a_file_is_made_once_and_again_where_it_is_damaged(parts, tmp_path, exports):
    path = files.Made(parts.unet, tmp_path, lambda *_: None).onnx()
    assert files.Made(parts.unet, tmp_path, lambda *_: None).onnx() == path
    assert exports == [path]
    path.write_bytes(path.read_bytes()[:1000])
    assert files.Made(parts.unet, tmp_path, lambda *_: None).onnx() == path
    assert exports == [path, path]


def test_another_file_is_made_where_weights_or_settings_change(tmp_path):
    unet = parts_of.parts("sd15", seed=3).unet

    def place():
        return files.Made(unet, tmp_path, lambda *_: None)._place

    first = place()
    assert place() == first
    unet.mid_block.resnets[0].norm1.weight[5] += 0.5
    second = place()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)  # no part of weights or config
    third = place()
    unet.set_attn_processor(AttnProcessor())
    assert len({first, second, third, place()}) == 4


def test_every_step_down_is_logged_with_its_reason(pipe, parts, folder, no_gpu, exports):
    done = shapecheck.accelerate(pipe, folder)
    assert (done.backend, done.artefact, done.unet) == ("torch", None, parts.unet)
    assert pipe.unet is parts.unet
    reason = "it runs on a GPU and the UNet is on cpu: move the pipeline first, with pipe.to(…)"
    assert done.refusals == (("trt", reason), ("ort-cuda", reason))
    warned = [each.message for each in no_gpu.records if each.levelno == logging.WARNING]
    assert warned == [
        f"trt does not run this UNet: {reason}",
        f"ort-cuda does not run this UNet: {reason}",
        "nothing faster runs here: the UNet stays in PyTorch",
    ]
    assert not exports
    done()
    with pytest.raises(road.AccelerationError, match=r"stays in PyTorch\n  trt: it runs on a GPU.*\n  ort-cuda: ") as caught:
        shapecheck.accelerate(pipe, folder, fallback="error")
    assert caught.value.refusals == done.refusals


def test_the_next_one_is_taken_where_one_refuses(pipe, folder, no_gpu, monkeypatch):
    monkeypatch.setattr(road, "_LADDER", ("trt", "ort"))
    with shapecheck.accelerate(pipe, folder) as done:
        assert done.backend == "ort"
        assert [name for name, _ in done.refusals] == ["trt"]
    assert [each.levelname for each in no_gpu.records] == ["WARNING", "INFO"]


def test_what_cannot_run_is_known_before_the_export(parts, tmp_path, exports, monkeypatch):
    """A GPU is pretended, and that nothing runs on it."""
    gaps = (Gap("no NVIDIA GPU and no driver", "nothing to install"), Gap("no cuDNN", "pip install cudnn"))
    monkeypatch.setattr(road.doctor, "backend", lambda name: Backend(name, False, "", gaps))
    made = files.Made(parts.unet, tmp_path, lambda *_: None)
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    told = re.escape("no NVIDIA GPU and no driver (nothing to install); no cuDNN (pip install cudnn)")
    with pytest.raises(ShapecheckError, match=told):
        road._started(on_gpu, made, "ort-cuda", (), None)
    assert not exports


def test_a_stream_and_its_pipeline_change_together(pipe, parts, folder):
    """StreamDiffusion's own attributes; a wrapper around it, too. It is pretended: the package is not in the registries."""
    stream = SimpleNamespace(pipe=pipe, unet=pipe.unet, width=104, height=72, trt_unet_batch_size=4, _is_unet_tensorrt=False)
    wrapper = SimpleNamespace(stream=stream)
    with shapecheck.accelerate(wrapper, folder, "ort") as done:
        assert stream.unet is pipe.unet is done.unet
        assert stream._is_unet_tensorrt is None
        stream._is_unet_tensorrt = True
        seen = stream.unet(torch.zeros(4, 4, 9, 13), torch.tensor([1, 3, 5, 7]), torch.zeros(4, 77, 32))[0]
        assert seen.shape == (4, 4, 9, 13)
    assert stream.unet is pipe.unet is parts.unet
    assert stream._is_unet_tensorrt is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "batch 1, latent 16×16 … batch 2, latent 16×16"),
        ({"sizes": ["72x104:104x72:136x136"], "batch": ["2:3:4"]}, None),
    ],
)
def test_engines_are_for_what_is_asked_for_else_for_what_is_usual(pipe, contract, given, expected):
    owners = road.Owners(pipe)
    if expected is None:
        with pytest.raises(ShapecheckError, match="is no range"):
            road._profiles(owners, contract, given["sizes"], given["batch"])
        given["sizes"] = ["72x72:104x72:136x136"]
    (profile,) = road._profiles(owners, contract, given.get("sizes", ()), given.get("batch", ()))
    shapes = profile.bounds("sample").shapes
    assert shapes == (
        ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16)) if expected else ((2, 4, 9, 9), (3, 4, 9, 13), (4, 4, 17, 17))
    )


def test_a_streams_engines_are_for_its_frames(pipe, contract):
    stream = SimpleNamespace(pipe=pipe, unet=pipe.unet, width=104, height=72, trt_unet_batch_size=4)
    (profile,) = road._profiles(road.Owners(stream), contract, (), ())
    assert set(profile.bounds("sample").shapes) == {(4, 4, 9, 13)}
    assert set(profile.bounds("down_block_residual_11").shapes) == {(4, 96, 2, 2)}


def test_two_that_do_not_fit_are_told_before_anything_is_written(parts, tmp_path):
    other = parts_of.parts("sdxl").controlnet
    pipe = pipes.PIPELINES["controlnet"](parts, controlnet=MultiControlNetModel([parts.controlnet, other]))
    with pytest.raises(ContractError, match="mid_block_residual"):
        shapecheck.accelerate(pipe, tmp_path, "ort")
    assert pipe.unet is parts.unet
    assert not any(tmp_path.iterdir())


def test_what_replaced_the_session_meanwhile_stays(pipe, parts, folder, no_gpu):
    done = shapecheck.accelerate(pipe, folder, "ort")
    other = parts_of.parts("sd15", seed=5).unet
    pipe.unet = other
    done()
    assert pipe.unet is other
    assert no_gpu.messages[-1] == "the UNet that accelerate put in was exchanged meanwhile: what is there now stays"


def test_what_cannot_be_exchanged_says_why(pipe, parts, folder, tmp_path, monkeypatch):
    with pytest.raises(ShapecheckError, match="dict holds no UNet: give a diffusers pipeline or a StreamDiffusion"):
        shapecheck.accelerate({}, folder)
    with pytest.raises(ShapecheckError, match="backend is one of auto, trt, "):
        shapecheck.accelerate(pipe, folder, "cuda")
    with pytest.raises(ShapecheckError, match="500 is no multiple of 8"):
        shapecheck.accelerate(pipe, folder, sizes=["500x512"])
    (tmp_path / "file").touch()
    with pytest.raises(ShapecheckError, match=r"cannot write into .*file"):
        shapecheck.accelerate(pipe, tmp_path / "file")
    with pytest.raises(ShapecheckError, match="hold two UNets"):
        shapecheck.accelerate(SimpleNamespace(pipe=pipe, unet=parts_of.parts("sd15", seed=5).unet), folder)
    with pytest.raises(ShapecheckError, match="class Identity is not exported yet"):
        shapecheck.accelerate(SimpleNamespace(unet=torch.nn.Identity()), folder)
    with shapecheck.accelerate(pipe, folder, "ort"), pytest.raises(ShapecheckError, match="exchanged already"):
        shapecheck.accelerate(pipe, folder, "ort")
    for name, advice in {"_hf_hook": "remove_all_hooks", "peft_config": "fuse_lora"}.items():
        with monkeypatch.context() as patched, pytest.raises(ShapecheckError, match=advice):
            patched.setattr(parts.unet, name, {"default": 1}, raising=False)
            shapecheck.accelerate(pipe, folder)


def test_a_backend_that_fails_leaves_the_pipeline_as_it_was(pipe, parts, folder, monkeypatch):
    def fails(*_, **__):
        raise ShapecheckError("out of file handles")

    monkeypatch.setattr(road, "load", fails)
    done = shapecheck.accelerate(pipe, folder, "ort")
    assert done.refusals == (("ort", "out of file handles"),)
    assert pipe.unet is parts.unet


@pytest.mark.full
def test_an_engine_is_built_beside_the_file_and_found_again(pipe, parts, contract, tmp_path):
    """TensorRT for RTX builds without a GPU, and runs on one only."""
    made = files.Made(parts.unet, tmp_path, lambda *_: None)
    profiles = road._profiles(road.Owners(pipe), contract, ["104x72"], ["1:2:2"])
    engine = made.engine("rtx", profiles)
    assert engine.parent == tmp_path
    assert shapecheck.read_contract(engine) == shapecheck.read_contract(made.onnx()) == contract
    written = engine.stat().st_mtime_ns
    assert made.engine("rtx", profiles) == engine
    assert engine.stat().st_mtime_ns == written
    assert made.engine("rtx", road._profiles(road.Owners(pipe), contract, ["72x72"], ["1"])) != engine
