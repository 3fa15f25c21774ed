"""Frames timed on several backends: measurements, reports and refusals. No test depends on how long anything took."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace

import engines
import pytest
import small
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel

import shapecheck
from shapecheck import Geometry, ShapecheckError
from shapecheck.cli import main
from shapecheck.doctor.environment import Backend, Gap
from shapecheck.pipelines import bench, frame
from shapecheck.pipelines import bench_report as report
from shapecheck.pipelines.bench import time_frames
from shapecheck.pipelines.bench_record import Bench, Frame, Timing
from shapecheck.runtime.load import load

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
        Timing("torch", "", reason="out of memory", asked=False), timing("torch-compile", 40, memory=3 << 20), timing("ort", 10)
    )
    text = report.render_text(result)
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines() if "×" in line and "%" in line]
    assert rows == [
        ["torch-compile", "40.00", "40.00", "25.00", "1.00×", "3", "50.0%", "12.5%", "37.5%"],
        ["ort", "10.00", "10.00", "100.00", "0.25×", "not known", "50.0%", "12.5%", "37.5%"],
    ]
    assert "note: torch did not run: out of memory" in text
    assert "ControlNets    2, in PyTorch" in text
    assert report.render_text(result, "markdown").startswith("# Frames of unet.onnx\n\n- device: cpu, 2 threads\n")
    assert result.ran
    assert not replace(result, timings=(*result.timings, Timing("trt", "", reason="no GPU"))).ran
    assert not make_bench(Timing("torch", "", reason="no memory", asked=False)).ran


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

    monkeypatch.setattr(bench, "load", load_watched)
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


@pytest.mark.skipif(sys.platform != "linux", reason="where it is read off /proc")
def test_memory_is_what_is_taken():
    before = bench.measure_memory(torch.device("cpu"))
    kept = torch.ones(16, 2**20)  # 64 MiB
    assert bench.measure_memory(torch.device("cpu")) - before >= kept.nbytes / 2


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

    monkeypatch.setattr(bench, "load", refuses)
    done = run(file, "--backends", "torch,ort", "--size", SIZE, "--frames", 1, "--warm-up", 1)
    assert done.exit_code == 2
    assert "note: ort did not run: out of file handles" in done.stdout
    assert re.search(r"(?m)^torch +\d", done.stdout)


def test_what_a_compiler_raises_is_told_and_no_failure_where_nobody_asked(file, monkeypatch):
    def raises(_module):
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
        (["--backends", "onnx"], "no backend 'onnx' to time; known: torch, torch-compile, ort, "),
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


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # said by torch, of its own compiler
def test_torch_compile_is_timed_beside_the_file(file):
    result = time_frames(str(file), size_px=(136, 72), frames=2, warm_up=1)
    assert [timing.reason for timing in result.timings] == ["", "", ""]
    ran = [(timing.backend, len(timing.frames)) for timing in result.timings]
    assert ran == [("torch", 2), ("torch-compile", 2), ("ort", 2)]
