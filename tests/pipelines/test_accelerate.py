"""A pipeline's UNet exchanged in one call, and put back. The exporter is torch's older one where a test is not of exporting."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import engines
import numpy as np
import onnxruntime
import pytest
import real_pipelines
import small
import torch
from diffusers import MultiControlNetModel
from diffusers.models.attention_processor import AttnProcessor

import shapecheck
from shapecheck import ContractError, ShapecheckError, doctor
from shapecheck.doctor.environment import Backend, Gap
from shapecheck.onnx import export as exporter
from shapecheck.pipelines import accelerate as acceleration
from shapecheck.pipelines import candidates
from shapecheck.pipelines import export_cache as files
from shapecheck.runtime.dropin_controlnet import DropInControlNet
from shapecheck.runtime.dropin_unet import DropInUNet
from shapecheck.tensorrt.profile_formats import choose_precision

ALLOWED = 1 / 255
SHORT = {"num_inference_steps": 2}
SMALL_SIZES, LARGE_SIZES = {"trt_profile_max_shapes": "sample:2x4x64x64"}, {"trt_profile_max_shapes": "sample:2x4x96x96"}
NO_GPU = (Gap("no NVIDIA GPU and no driver", "nothing to install"), Gap("no cuDNN", "pip install cudnn"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def unet():
    return small.unet(**small.TINY)


@pytest.fixture
def pipe(unet):
    """What is looked at of a pipeline. Whole ones are in test_pipelines.py and in the demo."""
    return SimpleNamespace(unet=unet, controlnet=small.controlnet(unet))


class OnGpu(torch.nn.Module):
    """A wrapper like torch.compile's, whose parameters say that they are on a GPU; it notes where it is sent."""

    def __init__(self, unet):
        super().__init__()
        self._orig_mod = unet
        self.sent = []

    def parameters(self, recurse=True):
        yield SimpleNamespace(device=torch.device("cuda"))

    def to(self, device):
        self.sent.append(str(device))
        return self


@pytest.fixture
def gpu_pipe(pipe):
    """A GPU is pretended: what is tried runs to where one would be touched."""
    return SimpleNamespace(unet=OnGpu(pipe.unet), controlnet=pipe.controlnet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(autouse=True)
def exports(monkeypatch):
    """What was exported. It stands in for our exporter, which takes a minute; the README's `shapecheck demo` uses that."""
    done = []

    def export(unet, path, **options):
        engines.exported_quickly(unet, path, **options)
        done.append(path)

    monkeypatch.setattr(exporter, "export", export)
    return done


@pytest.fixture
def no_gpu(caplog):
    caplog.set_level(logging.INFO, "shapecheck")
    return caplog


def say_what_runs(monkeypatch, *names):
    """Doctor says that these backends run, and no other."""
    monkeypatch.setattr(doctor, "backend", lambda name: Backend(name, name in names, "", () if name in names else NO_GPU))


def test_a_patched_unet_stays_in_pytorch_unless_that_is_an_error(pipe, folder, no_gpu):
    unet, net = pipe.unet, pipe.controlnet
    unet.set_attention_slice(1)
    done = shapecheck.accelerate(pipe, folder, "ort")
    words = r"attention slicing is on: pipe\.disable_attention_slicing\(\)"
    assert (done.backend, pipe.unet, pipe.controlnet) == ("torch", unet, net)
    assert re.search(words, no_gpu.messages[-1]) and re.search(words, dict(done.refusals)["ort"])
    done()
    with pytest.raises(ShapecheckError, match=words):
        shapecheck.accelerate(pipe, folder, "ort", fallback="error")


def test_a_pipeline_gives_the_same_images_and_gets_its_unet_back(folder, no_gpu):
    parts = real_pipelines.take_parts("shallow")
    pipe = real_pipelines.PIPELINES["controlnet"](parts)
    torch_images = real_pipelines.images(pipe, **SHORT)
    done = shapecheck.accelerate(pipe, folder, "ort")
    assert (done.backend, done.unet, done.refusals) == ("ort", pipe.unet, ())
    assert isinstance(pipe.unet, DropInUNet)
    assert isinstance(pipe.controlnet, DropInControlNet)
    (net,) = done.controlnets
    assert (net.backend, net.module, net.torch, net.reason) == ("ort", pipe.controlnet, parts.controlnet, "")
    assert no_gpu.messages[-2:] == [f"ort runs the UNet: {done.artefact}", f"ort runs ControlNet 1: {net.artefact}"]
    assert [path.name.partition("-")[0] for path in (done.artefact, net.artefact)] == ["unet", "controlnet"]
    images = real_pipelines.images(pipe, **SHORT)
    assert np.abs(images - torch_images).max() <= ALLOWED
    assert not np.array_equal(images, real_pipelines.images(pipe, **SHORT, controlnet_conditioning_scale=0.5))
    session = pipe.unet
    done()
    done()
    assert pipe.unet is parts.unet is done.unet
    assert pipe.controlnet is parts.controlnet
    assert [(net.backend, net.module) for net in done.controlnets] == [("torch", parts.controlnet)]
    assert (done.backend, done.artefact) == ("torch", None)
    assert np.array_equal(real_pipelines.images(pipe, **SHORT), torch_images)
    with pytest.raises(ShapecheckError, match="closed"):
        session(torch.zeros(1, 4, 9, 13), 1, torch.zeros(1, 77, 32))


def test_a_block_puts_it_back_even_when_it_fails(pipe, unet, folder):
    with pytest.raises(ZeroDivisionError), shapecheck.accelerate(pipe, folder, "ort"):
        assert isinstance(pipe.unet, DropInUNet)
        1 / 0  # noqa: B018
    assert pipe.unet is unet


def test_a_file_is_made_once_and_again_where_it_is_damaged(unet, tmp_path, exports):
    path = files.ExportCache(unet, tmp_path, lambda *_: None).export_onnx()
    assert files.ExportCache(unet, tmp_path, lambda *_: None).export_onnx() == path
    assert exports == [path]
    path.write_bytes(path.read_bytes()[:1000])
    assert files.ExportCache(unet, tmp_path, lambda *_: None).export_onnx() == path
    assert exports == [path, path]


def test_another_file_is_made_where_weights_or_settings_change(unet, tmp_path, monkeypatch):
    """Which one is of no matter here: the first is given out again and again."""
    first, asked = engines.export_sealed(unet), []

    def export(_unet, path, **_):
        shutil.copyfile(first, path)
        path.with_name(f"{path.name}.data").touch()
        asked.append(path)

    def take_file():
        return files.ExportCache(unet, tmp_path, lambda *_: None).export_onnx()

    monkeypatch.setattr(exporter, "export", export)
    found = [take_file(), take_file()]
    with torch.no_grad():
        unet.mid_block.resnets[0].norm1.weight[5] += 0.5
    found.append(take_file())
    unet.mid_block.resnets[0].output_scale_factor = 2.0  # no part of weights or config
    found.append(take_file())
    unet.set_attn_processor(AttnProcessor())
    found.append(take_file())
    assert found == [asked[0], *asked]
    assert len(set(asked)) == len(asked) == 4


def test_what_cannot_be_described_is_exported_each_time_and_removed_when_nobody_opens_it(unet, tmp_path, monkeypatch, caplog):
    first = engines.export_sealed(unet)
    monkeypatch.setattr(exporter, "export", lambda _unet, path, **_: shutil.copyfile(first, path))
    unet.conv_out.register_forward_hook(lambda _module, _inputs, image: 2 * image)
    took = [files.ExportCache(unet, tmp_path, lambda *_: None).export_onnx() for _ in range(2)]
    assert len({*took}) == 2
    assert "exported for this time alone" in caplog.text
    assert "a forward hook of conv_out is a function of test_accelerate.py" in caplog.text
    cache = files.ExportCache(unet, tmp_path, lambda *_: None)
    assert cache.path == cache.path
    os.utime(took[0], (0, 0))
    last = files.ExportCache(unet, tmp_path, lambda *_: None).export_onnx()
    assert {*tmp_path.glob("*.onnx")} == {took[1], last}


def open_as_onnx_runtime_does(cache, options, *, fails=False):
    """Build an engine into the provider's folder, or find one there by the graph's name: the same for all weights and sizes."""
    with cache.keep_engine(options) as given:
        assert given.items() >= options.items()
        place = Path(given["trt_engine_cache_path"])
        assert given == {**options, "trt_engine_cache_enable": "True", "trt_engine_cache_path": str(place),
                         "trt_timing_cache_enable": "True", "trt_timing_cache_path": str(place)}  # fmt: skip
        found = (place / "graph.engine").exists(), (place / "sm90.timing").exists()
        (place / "graph.engine").touch()
        if fails:
            raise ShapecheckError("killed while it was written")
        (place / "sm90.timing").touch()
    return found


def test_an_engine_of_onnx_runtime_is_kept_for_its_weights_and_sizes_and_only_whole(unet, tmp_path):
    """ONNX Runtime itself gives the images of other weights, in silence."""
    cache = files.ExportCache(unet, tmp_path, lambda *_: None)
    with pytest.raises(ShapecheckError, match="killed"):
        open_as_onnx_runtime_does(cache, SMALL_SIZES, fails=True)
    assert open_as_onnx_runtime_does(cache, SMALL_SIZES) == (False, False)
    assert open_as_onnx_runtime_does(cache, SMALL_SIZES) == (True, True)
    assert open_as_onnx_runtime_does(cache, LARGE_SIZES) == (False, True)
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1
    other = files.ExportCache(unet, tmp_path, lambda *_: None)
    assert open_as_onnx_runtime_does(other, SMALL_SIZES) == (False, True)
    assert open_as_onnx_runtime_does(cache, SMALL_SIZES) == open_as_onnx_runtime_does(cache, LARGE_SIZES) == (True, True)


def test_switches_of_onnx_runtimes_tensorrt_are_in_the_words_that_it_takes(unet, tmp_path):
    """Its binding refuses any other word, but only where TensorRT is; which options are switches is in the binding's texts."""
    binding = Path(onnxruntime.capi.onnxruntime_pybind11_state.__file__).read_bytes()
    switches = {key.decode() for key in re.findall(rb"The value for the key '(\w+)' should be 'True' or 'False'", binding)}
    if not switches:
        pytest.skip("this ONNX Runtime has no TensorRT provider")
    chosen = choose_precision(["float16", "bfloat16"])
    with files.ExportCache(unet, tmp_path, lambda *_: None).keep_engine(chosen) as options:
        ours = {key: value for key, value in options.items() if key in switches}
    assert ours.keys() == {*chosen, "trt_engine_cache_enable", "trt_timing_cache_enable"}
    assert set(ours.values()) == {"True"}


def test_an_engine_is_there_though_one_of_another_tensorrt_lies_beside_it(unet, tmp_path, monkeypatch):
    cache, profiles, records = files.ExportCache(unet, tmp_path, lambda *_: None), (object(),), {}
    for release, made_for in {"10.13.3": profiles, "10.6.0": (), "10.7.0": profiles}.items():
        (tmp_path / f"{cache.path.stem}-{release}.plan").touch()
        request = SimpleNamespace(options=files.BuildOptions(target="trt"), profiles=made_for, tensorrt=release)
        records[release] = SimpleNamespace(request=request)
    monkeypatch.setattr(files, "read_engine", lambda path: records[path.stem.rpartition("-")[2]])
    found = []
    for release in ("10.13.9", "10.7.0", "10.6.0", "10.8.0"):
        monkeypatch.setattr(files, "version", lambda name, release=release: release if name == "tensorrt" else "1")
        found.append(cache.has_engine("trt", profiles))
    assert found == [True, True, False, False]


def test_accelerate_opens_onnx_runtimes_tensorrt_with_the_engine_that_it_kept(gpu_pipe, folder, monkeypatch):
    opened = []

    def load(artefact, backend, **settings):
        opened.append((artefact.suffix, backend, settings["options"]))
        raise ShapecheckError("no GPU")

    say_what_runs(monkeypatch, "ort-trt")
    monkeypatch.setattr(candidates, "load", load)
    shapecheck.accelerate(gpu_pipe, folder, "ort-trt", sizes=["72x104"])
    ((suffix, backend, options),) = opened
    assert (suffix, backend) == (".onnx", "ort-trt")
    assert options["trt_engine_cache_enable"] == "True"
    assert "sample:2x4x13x9" in options["trt_profile_max_shapes"]


def test_a_backend_that_does_not_run_is_logged_with_its_reason(pipe, unet, folder, no_gpu, exports):
    done = shapecheck.accelerate(pipe, folder, "trt")
    assert (done.backend, done.artefact, done.unet) == ("torch", None, unet)
    assert pipe.unet is unet
    reason = "it runs on a GPU and the UNet is on cpu: move the pipeline first, with pipe.to(…)"
    assert done.refusals == (("trt", reason),)
    warned = [record.message for record in no_gpu.records if record.levelno == logging.WARNING]
    assert warned == [f"trt does not run this UNet: {reason}", "nothing faster runs here: the UNet stays in PyTorch"]
    assert not exports
    done()
    with pytest.raises(acceleration.AccelerationError, match=r"stays in PyTorch\n  trt: it runs on a GPU") as caught:
        shapecheck.accelerate(pipe, folder, "trt", fallback="error")
    assert caught.value.refusals == done.refusals


def test_what_is_in_pytorch_leaves_the_gpu_to_what_takes_its_place(gpu_pipe, tmp_path, no_gpu, monkeypatch):
    """ONNX Runtime on the CPU stands in for ONNX Runtime on a GPU."""
    unet, loaded = gpu_pipe.unet, []

    def load(artefact, backend, *, device, **_):
        loaded.append((artefact, backend, device))
        return shapecheck.load(artefact, "ort")

    monkeypatch.setattr(candidates, "load", load)
    say_what_runs(monkeypatch, "ort-cuda")
    with shapecheck.accelerate(gpu_pipe, tmp_path, "ort-cuda", controlnets=False) as done:
        assert loaded == [(done.artefact, "ort-cuda", torch.device("cuda"))]
        assert set(unet.sent) == {"cpu"}, "the GPU's memory is for what takes its place"
        assert [net.reason for net in done.controlnets] == ["controlnets=False"]
    assert gpu_pipe.unet is unet
    assert unet.sent[-1] == "cpu", "where the session that stood in was"


def test_what_cannot_run_is_known_before_the_export(gpu_pipe, tmp_path, exports, monkeypatch):
    say_what_runs(monkeypatch)
    done = shapecheck.accelerate(gpu_pipe, tmp_path, "ort-cuda")
    reason = "no NVIDIA GPU and no driver (nothing to install); no cuDNN (pip install cudnn)"
    assert done.refusals == (("ort-cuda", reason),)
    assert not exports


def test_a_stream_and_its_pipeline_change_together(pipe, unet, folder):
    """StreamDiffusion's own attributes; a wrapper around it, too. It is pretended: the package is not in the registries."""
    stream = SimpleNamespace(pipe=pipe, unet=unet, width=104, height=72, trt_unet_batch_size=4, _is_unet_tensorrt=False)
    wrapper = SimpleNamespace(stream=stream)
    with shapecheck.accelerate(wrapper, folder, "ort") as done:
        assert stream.unet is pipe.unet is done.unet
        assert stream._is_unet_tensorrt is None
        stream._is_unet_tensorrt = True
        seen = stream.unet(torch.zeros(4, 4, 9, 13), torch.tensor([1, 3, 5, 7]), torch.zeros(4, 77, 12))[0]
        assert seen.shape == (4, 4, 9, 13)
    assert stream.unet is pipe.unet is unet
    assert stream._is_unet_tensorrt is None


@pytest.fixture
def build_for(tmp_path, monkeypatch):
    """What `accelerate` has built; in place of TensorRT something that notes for what it is asked, and refuses."""
    asked = []

    def build_engine(path, *, profiles, **_):
        asked.append(profiles)
        raise ShapecheckError("no TensorRT")

    monkeypatch.setattr(exporter, "export", lambda *_, **__: None)
    monkeypatch.setattr(files, "build_engine", build_engine)
    say_what_runs(monkeypatch, "trt")

    def build(owner, **options):
        done = shapecheck.accelerate(owner, tmp_path, "trt", **options)
        assert done.refusals == (("trt", "no TensorRT"),)
        ((profile,),) = asked
        return profile

    return build


@pytest.fixture
def rounding_pipe():
    """Two levels: an odd size is rounded at the second."""
    return SimpleNamespace(unet=OnGpu(small.unet(**small.SHALLOW)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ((1, 4, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16))),
        ({"sizes": ["72x72:104x72:136x136"], "batch": ["2:3:4"]}, ((2, 4, 9, 9), (3, 4, 9, 13), (4, 4, 17, 17))),
    ],
)
def test_engines_are_for_what_is_asked_for_else_for_what_is_usual(rounding_pipe, build_for, options, expected):
    assert build_for(rounding_pipe, **options).bounds("sample").shapes == expected
    assert rounding_pipe.unet.sent == ["cpu", "cuda"], "it is back where it was"


def test_sizes_that_are_no_range_are_told_before_the_export(pipe, tmp_path, exports):
    with pytest.raises(ShapecheckError, match="is not a range"):
        shapecheck.accelerate(pipe, tmp_path, "ort", sizes=["72x104:104x72:136x136"], batch=["2:3:4"])
    assert not exports


def test_a_streams_engines_are_for_its_frames(rounding_pipe, build_for):
    stream = SimpleNamespace(pipe=rounding_pipe, unet=rounding_pipe.unet, width=104, height=72, trt_unet_batch_size=4)
    profile = build_for(stream)
    assert set(profile.bounds("sample").shapes) == {(4, 4, 9, 13)}
    assert set(profile.bounds("down_block_residual_02").shapes) == {(4, 8, 5, 7)}


def test_two_that_do_not_fit_are_told_before_anything_is_written(pipe, unet, tmp_path):
    other = small.controlnet(small.unet(**small.TINY | {"block_out_channels": (16,)}))
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, other])
    with pytest.raises(ContractError, match="mid_block_residual"):
        shapecheck.accelerate(pipe, tmp_path, "ort")
    assert pipe.unet is unet
    assert not any(tmp_path.iterdir())


def test_what_replaced_the_session_meanwhile_stays(pipe, folder, no_gpu):
    done = shapecheck.accelerate(pipe, folder, "ort")
    other = pipe.unet = small.unet(**small.TINY)
    done()
    assert pipe.unet is other
    assert no_gpu.messages[-1] == "the UNet that accelerate put in was exchanged meanwhile: what is there now stays"


def test_what_cannot_be_exchanged_says_why(pipe, unet, folder, tmp_path, monkeypatch):
    with pytest.raises(ShapecheckError, match="dict holds no UNet: give a diffusers pipeline or a StreamDiffusion"):
        shapecheck.accelerate({}, folder)
    with pytest.raises(ShapecheckError, match="backend is one of auto, torch-compile, trt, "):
        shapecheck.accelerate(pipe, folder, "cuda")
    with pytest.raises(ShapecheckError, match="budget is in seconds, from 0 on, or None: got nan"):
        shapecheck.accelerate(pipe, folder, budget=float("nan"))
    with pytest.raises(ShapecheckError, match="vae=True: the pipeline holds no VAE"):
        shapecheck.accelerate(pipe, folder, vae=True)
    with pytest.raises(ShapecheckError, match="500 is not a multiple of 8"):
        shapecheck.accelerate(pipe, folder, sizes=["500x512"])
    (tmp_path / "file").touch()
    with pytest.raises(ShapecheckError, match=r"cannot write into .*file"):
        shapecheck.accelerate(pipe, tmp_path / "file")
    with pytest.raises(ShapecheckError, match="hold two UNets"):
        shapecheck.accelerate(SimpleNamespace(pipe=pipe, unet=small.unet(**small.TINY)), folder)
    with pytest.raises(ShapecheckError, match="class Identity is not exported yet"):
        shapecheck.accelerate(SimpleNamespace(unet=torch.nn.Identity()), folder)
    with shapecheck.accelerate(pipe, folder, "ort"), pytest.raises(ShapecheckError, match="exchanged already"):
        shapecheck.accelerate(pipe, folder, "ort")
    monkeypatch.setattr(unet, "_hf_hook", object(), raising=False)
    with pytest.raises(ShapecheckError, match="remove_all_hooks"):
        shapecheck.accelerate(pipe, folder)


def test_a_backend_that_fails_leaves_the_pipeline_as_it_was(pipe, unet, folder, monkeypatch):
    def fails(*_, **__):
        raise ShapecheckError("out of file handles")

    monkeypatch.setattr(candidates, "load", fails)
    done = shapecheck.accelerate(pipe, folder, "ort")
    assert done.refusals == (("ort", "out of file handles"),)
    assert pipe.unet is unet


@pytest.mark.full
def test_an_engine_is_built_beside_the_file_and_found_again(gpu_pipe, tmp_path, monkeypatch):
    """TensorRT for RTX builds without a GPU, and runs on one only."""
    opened = []

    def load(artefact, backend, **_):
        opened.append((artefact, backend, artefact.stat().st_mtime_ns))
        raise ShapecheckError("it runs on a GPU only")

    monkeypatch.setattr(candidates, "load", load)
    say_what_runs(monkeypatch, "rtx")
    for size in ("104x72", "104x72", "72x72"):
        done = shapecheck.accelerate(gpu_pipe, tmp_path, "rtx", sizes=[size], batch=["1:2:2"])
        assert done.refusals == (("rtx", "it runs on a GPU only"),)
    first, again, other = opened
    assert first == again
    assert first[0] != other[0]
    assert first[0].parent == tmp_path
    (file,) = tmp_path.glob("*.onnx")
    assert shapecheck.read_contract(first[0]) == shapecheck.read_contract(file) == shapecheck.probe(gpu_pipe.unet)
