"""Frames timed on several backends: measurements, reports and refusals. No test depends on how long anything took."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import engines
import onnx_files
import pytest
import small
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel, UNet2DConditionModel

import shapecheck
from shapecheck import Geometry, ShapecheckError
from shapecheck.cli import main
from shapecheck.contract.naming import find_scheme
from shapecheck.doctor.environment import Backend, Gap
from shapecheck.observe.probe import probe_controlnet
from shapecheck.pipelines import bench, frame, frame_loading, frame_timing
from shapecheck.pipelines import bench_report as report
from shapecheck.pipelines.bench import time_frames
from shapecheck.pipelines.bench_record import Bench, Frame, Picture, PicturePart, Timing
from shapecheck.pipelines.picture_parts import find_picture_models, time_parts
from shapecheck.progress import silent
from shapecheck.runtime.load import load
from shapecheck.runtime.onnx_session import OnnxSession

SIZE = "136x72"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "unet.onnx"
    shutil.copyfile(engines.export_sealed(small.unet(**small.TINY)), path)
    return path


@pytest.fixture
def ticking(monkeypatch):
    """A clock that is one second later whenever it is looked at, so that parts are known."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a GPU its own events are the clock
    ticks = iter(range(10_000))
    monkeypatch.setattr(frame.time, "perf_counter", lambda: float(next(ticks)))


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def timing(backend, *totals, **more):
    return Timing(backend, f"{backend}, float32", tuple(Frame(total / 2, total / 8, total * 3 / 8) for total in totals), **more)


def make_bench(*timings, **more):
    values = {
        "artefact": "unet.onnx",
        "contract": "sha256:ab",
        "geometry": Geometry(2, 9, 17),
        "controlnets": 2,
        "device": "cpu, 2 threads",
        "versions": (("torch", "2.13"),),
    } | more
    return Bench(timings=timings, **values)


def test_numbers_are_those_of_the_frames():
    result = timing("ort", *range(1, 101))
    assert (result.median, result.p95, result.rate) == (50.5, 95.0, 1000 / 50.5)
    assert result.shares == {"controlnet": 0.5, "handover": 0.125, "unet": 0.375}
    assert timing("ort", 7.0).p95 == 7.0


def test_the_report_compares_with_the_first_that_ran():
    result = make_bench(
        Timing("torch", "", reason="out of memory", asked=False),
        timing("torch-compile", 40, memory=3 << 20, seconds=61.3, controlnets="2, compiled likewise"),
        timing("ort", 10, controlnets="canny.onnx on ort, depth.onnx on ort"),
    )
    text = report.render_text(result)
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines() if "×" in line and "%" in line]
    assert rows == [
        ["torch-compile", "40.00", "40.00", "25.00", "1.00×", "3", "61.3", "50.0%", "12.5%", "37.5%"],
        ["ort", "10.00", "10.00", "100.00", "0.25×", "not known", "not known", "50.0%", "12.5%", "37.5%"],
    ]
    assert "note: torch did not run: out of memory" in text
    assert re.search(r"(?m)^torch-compile +torch-compile, float32; ControlNets: 2, compiled likewise$", text)
    assert re.search(r"(?m)^ort +ort, float32; ControlNets: canny.onnx on ort, depth.onnx on ort$", text)
    assert report.render_text(result, "markdown").startswith("# Frames of unet.onnx\n\n- device: cpu, 2 threads\n")
    assert result.ran
    assert not replace(result, timings=(*result.timings, Timing("trt", "", reason="no GPU"))).ran
    assert not make_bench(Timing("torch", "", reason="no memory", asked=False)).ran


PARTS = (
    PicturePart("VAE decode", "AutoencoderKL by the usual config, float16", 25.0, 10.0),
    PicturePart("VAE encode", "AutoencoderKL by the usual config, float16", 14.0, reason="no compiler"),
    PicturePart("text", "CLIPTextModel by the usual config, float16", 5.0),
)


def test_a_picture_is_its_steps_and_what_surrounds_them():
    result = make_bench(timing("ort", 10, 30), steps=1, parts=PARTS)
    picture = result.compose_picture(result.timings[0])
    assert (picture, picture.total) == (Picture(20, 25, 5), 50)
    assert picture.shares == {"frames": 0.4, "decode": 0.5, "text": 0.1}
    assert result.compose_picture(result.timings[0], compiled=True) == Picture(20, 10, 5)
    twenty = replace(result, steps=20, parts=PARTS[:1])
    assert twenty.compose_picture(twenty.timings[0]) == Picture(400, 25, None)
    text = report.render_text(result)
    assert re.search(r"(?m)^ort +20\.00 +25\.00 +5\.00 +50\.00 +35\.00 +40\.0% +50\.0% +10\.0%$", text)
    assert re.search(r"(?m)^VAE decode +25\.00 ms eager, 10\.00 compiled: AutoencoderKL", text)
    assert "## A picture of 1 step\n" in report.render_text(result, "markdown")
    assert "note: VAE encode was not timed compiled: no compiler" in text
    values = json.loads(report.render_json(result))["timings"][0]
    assert values["picture"] == {
        "frames": 20,
        "decode": 25,
        "text": 5,
        "total": 50,
        "shares": {"frames": 0.4, "decode": 0.5, "text": 0.1},
    }
    assert values["picture_vae_compiled"]["total"] == 35


def test_a_part_that_was_not_timed_counts_nothing_and_says_why():
    lone = (PARTS[0], PicturePart("text", "", reason="it needs the package transformers"))
    text = report.render_text(make_bench(timing("ort", 10), steps=2, parts=(replace(lone[0], compiled=None), lone[1])))
    assert re.search(r"(?m)^ort +20\.00 +25\.00 +not timed +45\.00 +44\.4% +55\.6% +0\.0%$", text)
    assert "note: text was not timed: it needs the package transformers" in text
    assert "with the VAE compiled" not in text


def test_json_holds_every_frame():
    values = json.loads(report.render_json(make_bench(timing("ort", 10, 30), Timing("trt", "", reason="no GPU"))))
    first, second = values["timings"]
    assert (values["shapecheck_bench"], values["geometry"]["width"], values["controlnets"]) == (1, 17, 2)
    assert first["frames"] == [{"controlnet": n / 2, "handover": n / 8, "unet": n * 3 / 8} for n in (10, 30)]
    assert (first["median_ms"], first["p95_ms"], first["frames_per_second"]) == (20, 30, 50)
    assert first["shares"] == {"controlnet": 0.5, "handover": 0.125, "unet": 0.375}
    assert (second["reason"], second["frames"]) == ("no GPU", [])


@pytest.mark.parametrize("name", ["torch", "ort"])
def test_parts_lie_between_the_marks(file, ticking, name):
    """Five marks a frame: four parts, one tick each, of which two are the hand-over; as many in PyTorch as in a session."""
    result = time_frames(str(file), backends=(name,), size_px=(136, 72), frames=2, warm_up=1)
    assert result.timings[0].frames == (Frame(1000.0, 2000.0, 1000.0),) * 2


def test_backends_take_turns_and_compute_the_same_call(file, monkeypatch):
    """Each frame that counts follows one of its own backend; residuals of as many ControlNets as were asked for."""
    calls = []
    forward = UNet2DConditionModel.forward

    def note(name, sample, residuals=()):
        calls.append((name, tuple(sample.shape), len(residuals)))

    def watch_torch(self, sample, *given, **options):
        note("torch", sample, options.get("down_block_additional_residuals", ()))
        return forward(self, sample, *given, **options)

    def watch_session(_module, _given, options):
        note("ort", options["sample"], options.get("down_block_additional_residuals", ()))

    def load_watched(*given, **options):
        unet = load(*given, **options)
        unet.register_forward_pre_hook(watch_session, with_kwargs=True)
        return unet

    monkeypatch.setattr(frame_loading, "load", load_watched)
    monkeypatch.setattr(UNet2DConditionModel, "forward", watch_torch)
    result = time_frames(str(file), backends=("torch", "ort"), size_px=(136, 72), batch=3, controlnets=2, frames=3, warm_up=2)
    slots = len(shapecheck.read_contract(file).slots)
    assert [name for name, *_ in calls] == ["torch"] * 2 + ["ort"] * 2 + ["torch", "torch", "ort", "ort"] * 3
    assert {tuple(rest) for _, *rest in calls} == {((3, 4, 9, 17), slots - 1)}
    assert [len(timing.frames) for timing in result.timings] == [3, 3]
    assert all(part > 0 for timing in result.timings for frame in timing.frames for part in (frame.controlnet, frame.unet))
    calls.clear()
    time_frames(str(file), backends=("ort",), size_px=(136, 72), controlnets=0, frames=1, warm_up=1)
    assert calls == [("ort", (1, 4, 9, 17), 0)] * 3


@pytest.fixture(scope="module")
def canny(tmp_path_factory):
    net = small.controlnet(small.unet(**small.TINY))
    return onnx_files.controlnet_written(tmp_path_factory.mktemp("bench") / "canny.onnx", net, latent=(9, 13))


def test_exported_controlnets_run_in_every_frame_and_pytorch_runs_their_likes(file, canny, monkeypatch):
    """Their residuals are what the UNet gets: with the file it is called as often as they are, and no ControlNet in PyTorch."""
    calls = []
    forward = ControlNetModel.forward

    def watch_torch(self, sample, *given, **options):
        calls.append("torch")
        return forward(self, sample, *given, **options)

    def load_watched(artefact, *given, **options):
        loaded = load(artefact, *given, **options)
        loaded.register_forward_hook(lambda *_: calls.append(Path(artefact).name))
        return loaded

    monkeypatch.setattr(frame_loading, "load", load_watched)
    monkeypatch.setattr(ControlNetModel, "forward", watch_torch)
    files = [str(canny), str(canny)]
    result = time_frames(str(file), backends=("torch", "ort"), size_px=(136, 72), controlnet_files=files, frames=1, warm_up=1)
    assert [timing.controlnets for timing in result.timings] == ["2, in PyTorch", "canny.onnx on ort, canny.onnx on ort"]
    assert (result.controlnets, [timing.reason for timing in result.timings]) == (2, ["", ""])
    assert (
        calls
        == ["torch"] * 2
        + ["canny.onnx", "canny.onnx", "unet.onnx"]
        + ["torch"] * 4
        + ["canny.onnx", "canny.onnx", "unet.onnx"] * 2
    )


def test_a_controlnet_beside_an_engine_runs_on_the_gpu_and_an_engine_anywhere_in_tensorrt():
    runners = [frame_loading.choose_runner("canny.onnx", backend) for backend in ("ort", "ort-trt", "trt")]
    assert runners == ["ort", "ort-trt", "ort-cuda"]
    assert [frame_loading.choose_runner("depth.plan", backend) for backend in ("ort-cuda", "trt")] == ["trt", "trt"]


def test_onnx_runtimes_tensorrt_gets_the_one_size_under_the_names_of_the_file(file, tmp_path, monkeypatch):
    contract = shapecheck.read_contract(file)
    ours = [slot.name for slot in contract.slots]
    names = dict(zip(ours, find_scheme("streamdiffusion").names(len(ours) - 1), strict=True))
    theirs, opened = onnx_files.planted(file, tmp_path / "theirs.onnx", onnx_files.rename(**names)), []

    def refuse(_path, *, options, **_others):
        opened.append(options)
        raise ShapecheckError("no GPU")

    monkeypatch.setattr(OnnxSession, "open", refuse)
    loader = frame_loading.Loader(str(theirs), contract, Geometry(2, 9, 17), torch.device("meta"), (), [])
    with pytest.raises(ShapecheckError, match="no GPU"):
        loader.open_file(str(theirs), "ort-trt", contract)
    (options,) = opened
    (shapes,) = {options[f"trt_profile_{bound}_shapes"] for bound in ("min", "opt", "max")}
    sizes = dict(tensor.split(":") for tensor in shapes.split(","))
    assert sizes["sample"] == "2x4x9x17"
    assert sizes.keys() == contract.input_rules.keys() - set(ours) | set(names.values())


def test_reduce_overhead_is_the_line_a_user_types_and_marks_its_steps(file, monkeypatch):
    """UNet and ControlNet are compiled, none of their weights being those of eager PyTorch, and each frame is a step."""
    compiled, steps = [], []

    def compile_nothing(module, **options):
        compiled.append((module, options))
        return module

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = time_frames(str(file), backends=("torch", "torch-reduce-overhead"), size_px=(136, 72), frames=2, warm_up=1)
    assert [type(module).__name__ for module, _ in compiled] == ["UNet2DConditionModel", "ControlNetModel"]
    assert all(options == {"mode": "reduce-overhead", "fullgraph": True} for _, options in compiled)
    assert all(next(module.parameters()).is_contiguous(memory_format=torch.channels_last) for module, _ in compiled)
    assert len(steps) == 1 + 2 * 2
    assert result.timings[1].controlnets == "1, compiled likewise"


@pytest.mark.full
def test_a_folders_own_vae_and_text_encoder_are_timed(file, tmp_path):
    """Of a folder's UNet those beside it: of widths that no family has."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    configs = {
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 3},
        "text_encoder": text | {"architectures": ["CLIPTextModel"]},
        "text_encoder_2": text | {"architectures": ["T5EncoderModel"]},
        "unet": {},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    contract, device = shapecheck.read_contract(file), torch.device("cpu")
    models = find_picture_models(contract, (None, str(tmp_path / "unet")))
    with torch.no_grad():
        parts = [
            time_parts(known, contract, Geometry(1, 9, 17), device, compiled=False, progress=silent)
            for known in (replace(models, text=models.text[:1]), replace(models, vae={"_class_name": "VQModel"}))
        ]
    assert [(part.name, part.reason) for part in parts[0]] == [("VAE decode", ""), ("VAE encode", ""), ("text", "")]
    assert all(part.eager > 0 and part.compiled is None for part in parts[0])
    assert parts[0][2].ran == "CLIPTextModel by the folder's own config, float32"
    assert "a VAE of class VQModel is not timed" in parts[1][0].reason
    assert "a text encoder of class T5EncoderModel is not timed" in parts[1][2].reason


def test_the_usual_models_are_those_of_the_family():
    widths = {}
    for name in ("sd15", "sd-turbo", "sdxl"):
        models = find_picture_models(shapecheck.presets.contract(name), (name,))
        widths[name] = [config["hidden_size"] for config in models.text]
        assert models.vae["block_out_channels"] == (128, 256, 512, 512)
    assert widths == {"sd15": [768], "sd-turbo": [1024], "sdxl": [768, 1280]}  # SDXL's text is both, 2048 wide
    assert find_picture_models(shapecheck.presets.contract("kandinsky-2.2"), ()).vae is None


def test_without_transformers_the_line_of_the_text_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    contract = shapecheck.presets.contract("sd15")
    models = replace(find_picture_models(contract, ()), vae=None)
    parts = time_parts(models, contract, Geometry(1, 9, 17), torch.device("cpu"), compiled=False, progress=silent)
    assert (
        parts[2].reason == "timing the text encoder needs the package transformers: pip install 'shapecheck-controlnet[demo]'"
    )
    assert "no VAE is known for this UNet" in parts[0].reason


@pytest.mark.skipif(sys.platform != "linux", reason="where it is read off /proc")
def test_memory_is_what_is_taken():
    before = frame_timing.measure_memory(torch.device("cpu"))
    kept = torch.ones(16, 2**20)  # 64 MiB
    assert frame_timing.measure_memory(torch.device("cpu")) - before >= kept.nbytes / 2


def test_the_command_prints_and_writes(file, tmp_path):
    done = run(file, "--backends", "torch, ort", "--size", SIZE, "--frames", 2, "--warm-up", 1, "--format", "json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert [timing["backend"] for timing in values["timings"]] == ["torch", "ort"]
    assert values["geometry"] == {"batch": 1, "height": 9, "width": 17, "tokens": 77}
    out = tmp_path / "bench.md"
    done = run(file, "--backends", "ort", "--size", SIZE, "--frames", 1, "--controlnets", 0, "--format", "markdown", "-o", out)
    assert (done.exit_code, done.stdout) == (0, "")
    assert out.read_text().startswith(f"# Frames of {file}\n")


def test_a_backend_that_does_not_run_is_told_and_fails(file, monkeypatch):
    def refuses(*_, **__):
        raise ShapecheckError("out of file handles")

    monkeypatch.setattr(frame_loading, "load", refuses)
    done = run(file, "--backends", "torch,ort", "--size", SIZE, "--frames", 1, "--warm-up", 1)
    assert done.exit_code == 2
    assert "note: ort did not run: out of file handles" in done.stdout
    assert re.search(r"(?m)^torch +\d", done.stdout)


def test_what_a_compiler_raises_is_told_and_no_failure_where_nobody_asked(file, monkeypatch):
    def raises(*_, **__):
        raise AssertionError("no compiler\nis here")

    monkeypatch.setattr(torch, "compile", raises)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = time_frames(str(file), size_px=(136, 72), frames=1, warm_up=1)
    assert [timing.backend for timing in result.timings if timing.frames] == ["torch", "ort"]
    assert r"no compiler\nis here" in result.timings[1].reason
    assert result.ran


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backends", "onnx"], "no backend 'onnx' to time; known: torch, torch-compile, torch-reduce-overhead, ort, "),
        (["--backends", "ort,trt"], "ort runs on the CPU and trt on a GPU: time them in two runs"),
        (["--size", "100x72"], "width 100 is not a multiple of 8"),
        (["--size", "big"], "'big' is not a size"),
        (["--frames", "0"], "Invalid value for '--frames'"),
        (["-o", "no/such/folder.md"], "cannot write no/such/folder.md: No such file"),
    ],
)
def test_what_cannot_be_timed_is_said_at_once(file, options, words):
    done = run(file, *options)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_gpu_that_is_not_there_is_said_at_once(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gaps = (Gap("no NVIDIA GPU and no driver", ""),)
    monkeypatch.setattr(bench.doctor, "backend", lambda name: Backend(name, False, "", gaps))
    done = run(file, "--backends", "ort-cuda")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "ort-cuda cannot run here: no NVIDIA GPU" in done.stderr


def test_a_controlnet_or_a_unet_without_slots_says_what_to_give(file, tmp_path):
    contract = shapecheck.read_contract(file)
    (tmp_path / "net.json").write_text(replace(contract, role="controlnet").to_json())
    done = run(tmp_path / "net.json")
    assert done.exit_code == 2
    assert "net.json is a ControlNet: give a UNet" in done.stderr
    (tmp_path / "plain.json").write_text(replace(contract, slots=()).to_json())
    done = run(tmp_path / "plain.json", "--controlnets", 1)
    assert done.exit_code == 2
    assert "takes no residuals: --controlnets 0" in done.stderr


def test_a_controlnet_that_does_not_fit_is_refused_before_anything_runs(file, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(probe_controlnet(small.controlnet(small.unet(**small.SHALLOW))).to_json())
    done = run(file, "--controlnet", other, "--size", SIZE)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "the residuals do not fit this UNet" in done.stderr
    done = run(file, "--controlnet", file, "--size", SIZE)
    assert done.exit_code == 2
    assert "unet.onnx is a UNet: --controlnet takes a ControlNet's ONNX file or engine" in done.stderr
    done = run(file, "--controlnet", other, "--controlnets", 2, "--size", SIZE)
    assert done.exit_code == 2
    assert "give one of both" in done.stderr


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # said by torch, of its own compiler
def test_torch_compile_is_timed_beside_the_file(file):
    result = time_frames(str(file), size_px=(136, 72), frames=2, warm_up=1)
    assert [timing.reason for timing in result.timings] == ["", "", ""]
    ran = [(timing.backend, len(timing.frames)) for timing in result.timings]
    assert ran == [("torch", 2), ("torch-compile", 2), ("ort", 2)]
