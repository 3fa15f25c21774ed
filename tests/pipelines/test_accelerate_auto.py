"""`accelerate` measures: what is prepared, checked, timed, installed and remembered. Times are numbers of the tests.

The exporter is torch's older one. In place of torch.compile, and of GPUs, files run in ONNX Runtime on the CPU.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import engines
import pytest
import small
import torch

import shapecheck
from shapecheck import ShapecheckError, doctor
from shapecheck.doctor.environment import Backend, Gap
from shapecheck.onnx import export as exporter
from shapecheck.pipelines import candidates, export_cache, kept_contracts, measure
from shapecheck.pipelines.accelerate import AccelerationError
from shapecheck.pipelines.contest import explain_not_begun
from shapecheck.runtime.dropin import DropIn

SIZES = {"sizes": ["104x72"], "batch": ["1:2:2"], "budget": None}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def observed():
    """The UNet's contract: with which ControlNets it was observed is no part of it."""
    return shapecheck.read_contract(engines.export_sealed(small.unet(**small.TINY)))


@pytest.fixture
def pipe():
    unet = small.unet(**small.TINY)
    return SimpleNamespace(unet=unet, controlnet=small.controlnet(unet))


def make_maker(folder):
    return candidates.CandidateMaker(folder, (), {}, lambda *_: None, contracts={}, strict=False)


class Bench:
    """What the tests decide of each backend: how long its frames take, and what it computes with."""

    def __init__(self):
        self.times = {"torch": 30.0, "ort": 20.0, "torch-compile": 10.0}
        self.loaded = []
        self.failures = {}
        self.instead = {}
        self.duels = []

    def load(self, artefact, backend, **options):
        role = "controlnet" if isinstance(artefact, torch.nn.Module) and "ControlNet" in type(artefact).__name__ else ""
        self.loaded.append(backend)
        if failure := self.failures.get(backend):
            raise failure
        if backend == "torch-compile":
            path = options["cache"].parent / f"stand-in-{role or 'unet'}.onnx"
            engines.exported_quickly(self.instead.get(role or "unet", artefact), path, weights="copy", progress=None)
            artefact = path
        return shapecheck.load(artefact, "ort", finite=options["finite"], own_outputs=options["own_outputs"])

    def time(self, models, *_):
        self.duels.append(tuple(models))
        return {name: self.times[name] for name in models}


@pytest.fixture
def bench(monkeypatch, caplog, observed):
    caplog.set_level(logging.INFO, "shapecheck")
    bench = Bench()
    monkeypatch.setattr(exporter, "export", engines.exported_quickly)
    monkeypatch.setattr(kept_contracts, "probe", lambda *_: observed)
    monkeypatch.setattr(doctor, "backend", lambda name: Backend(name, True, ""))
    monkeypatch.setattr(candidates, "load", bench.load)
    monkeypatch.setattr(measure, "time_in_turns", bench.time)
    return bench


def forbid(monkeypatch, *names):
    def fail(*_, **__):
        raise AssertionError("nothing may be measured")

    for name in names:
        monkeypatch.setattr(measure, name, fail)


def test_the_fastest_that_is_right_is_installed_and_the_next_start_measures_nothing(pipe, bench, tmp_path, caplog, monkeypatch):
    unet, controlnet = pipe.unet, pipe.controlnet
    with shapecheck.accelerate(pipe, tmp_path, **SIZES) as done:
        assert done.backend == "torch-compile"
        assert pipe.unet is done.unet and isinstance(pipe.unet, DropIn)
        assert pipe.controlnet is done.controlnets[0].module and isinstance(pipe.controlnet, DropIn)
        assert done.refusals == () == done.pending
    assert (pipe.unet, pipe.controlnet) == (unet, controlnet)
    assert bench.duels == [("torch", "ort"), ("ort", "torch-compile")], "the best so far, and never three at once"
    assert [(one.backend, one.milliseconds, one.right) for one in done.measured] == [
        ("torch", 30.0, False),
        ("ort", 20.0, True),
        ("torch-compile", 10.0, True),
    ]
    assert "torch-compile is the fastest that is right: a frame takes 10.00 ms, 30.00 in PyTorch" in caplog.messages
    assert "right: at most" in next(line for line in str(done).splitlines() if line.startswith("ort "))

    forbid(monkeypatch, "compute_reference", "time_in_turns", "check_outputs")
    for name in ("probe", "resolve_subject"):
        monkeypatch.delattr(kept_contracts, name)  # nor is anything observed
    bench.loaded.clear()
    again = shapecheck.accelerate(pipe, tmp_path, **SIZES)
    assert (again.backend, again.measured) == ("torch-compile", done.measured)
    assert set(bench.loaded) == {"torch-compile"}
    again()


@pytest.mark.full
def test_other_weights_are_measured_anew(pipe, bench, tmp_path):
    shapecheck.accelerate(pipe, tmp_path, **SIZES)()
    bench.times["torch"] = 5.0
    assert shapecheck.accelerate(pipe, tmp_path, **SIZES, controlnets=False).backend == "torch"
    with torch.no_grad():
        pipe.controlnet.controlnet_mid_block.weight[0] += 0.5
    assert shapecheck.accelerate(pipe, tmp_path, **SIZES).backend == "torch"
    assert len(list(tmp_path.glob("measured-*.json"))) == 3


@pytest.mark.parametrize("role", ["unet", "controlnet"])
def test_one_that_is_wrong_is_not_installed_however_fast(pipe, bench, tmp_path, caplog, role):
    other = small.unet(**small.TINY)
    with torch.no_grad():
        other.conv_out.weight[0] *= 1.01
    bench.instead[role] = other if role == "unet" else small.controlnet(other, seed=5)
    bench.times["torch-compile"] = 0.1
    with shapecheck.accelerate(pipe, tmp_path, **SIZES) as done:
        assert done.backend == "ort"
    (refusal,) = done.refusals
    output = "the image with control on" if role == "unet" else "ControlNet 1, down_block_residual_00"
    assert refusal[1].startswith(f"wrong: {output}: largest difference ")
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"torch-compile  wrong: {output}")


def test_pytorch_stays_where_it_is_the_fastest(pipe, bench, tmp_path, caplog):
    unet, controlnet, bench.times["torch"] = pipe.unet, pipe.controlnet, 9.0
    done = shapecheck.accelerate(pipe, tmp_path, **SIZES)
    assert (done.backend, pipe.unet, pipe.controlnet) == ("torch", unet, controlnet)
    assert caplog.messages[-1] == (
        "nothing faster runs here: the UNet stays in PyTorch, where a frame takes 9.00 ms, 20.00 in ort, 10.00 in torch-compile"
    )
    assert shapecheck.accelerate(pipe, tmp_path, **SIZES).backend == "torch"
    with pytest.raises(AccelerationError, match=r"stays in PyTorch, where a frame takes 9\.00 ms, 20\.00 in ort"):
        shapecheck.accelerate(pipe, tmp_path, **SIZES, fallback="error")


@pytest.mark.full
def test_a_controlnet_that_failed_under_fallback_error_does_not_count_under_fallback_log(pipe, bench, tmp_path, monkeypatch):
    opened = candidates.CandidateMaker.open

    def open_unet(self, backend, model, noun, **options):
        if noun == "ControlNet":
            raise ShapecheckError("out of file handles")
        return opened(self, backend, model, noun, **options)

    monkeypatch.setattr(candidates.CandidateMaker, "open", open_unet)
    with pytest.raises(AccelerationError, match="ort: out of file handles"):
        shapecheck.accelerate(pipe, tmp_path, **SIZES, fallback="error")
    with shapecheck.accelerate(pipe, tmp_path, **SIZES) as done:
        assert (done.backend, done.controlnets[0].backend) == ("torch-compile", "torch")


def test_memory_that_does_not_suffice_and_a_compiler_that_fails_are_refusals(pipe, bench, tmp_path, monkeypatch):
    bench.failures = {"ort": torch.OutOfMemoryError("CUDA out of memory"), "torch-compile": KeyError("no compiler")}
    done = shapecheck.accelerate(pipe, tmp_path, **SIZES)
    assert done.backend == "torch"
    assert dict(done.refusals) == {
        "ort": "the memory of cpu does not suffice; a smaller size or batch takes less",
        "torch-compile": "KeyError: 'no compiler'",
    }


def test_the_figures_of_a_gpu_are_told_with_what_does_not_suffice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 8 * 2**30))
    text = candidates.explain_failure(torch.OutOfMemoryError(), torch.device("cuda:0"))
    assert "without it 3.0 of 8.0 GiB are free" in text


def test_what_doctor_says_does_not_run_is_not_begun(pipe, bench, tmp_path, monkeypatch):
    gap = Gap("no onnxruntime", "pip install onnxruntime")
    monkeypatch.setattr(doctor, "backend", lambda name: Backend(name, False, "", (gap,)))
    with shapecheck.accelerate(pipe, tmp_path, **SIZES) as done:
        assert done.refusals == (("ort", "no onnxruntime (pip install onnxruntime)"),)
        assert not any(one.waiting for one in done.measured)


def test_what_does_not_fit_into_the_budget_waits_until_its_files_are_there(pipe, bench, tmp_path):
    first = shapecheck.accelerate(pipe, tmp_path, **SIZES | {"budget": 0})
    assert first.backend == "torch"
    assert [one.backend for one in first.measured if one.waiting] == ["ort", "torch-compile"]
    assert not bench.duels
    assert shapecheck.accelerate(pipe, tmp_path, **SIZES | {"budget": 0}).measured == first.measured
    for model in (pipe.unet, pipe.controlnet):
        export_cache.ExportCache(model, tmp_path, lambda *_: None).export_onnx()
    with shapecheck.accelerate(pipe, tmp_path, **SIZES | {"budget": 0}) as still:
        assert still.backend == "torch", "they have to be loaded, and there is no second for it"
    with shapecheck.accelerate(pipe, tmp_path, **SIZES | {"budget": 600.0}) as later:
        assert later.backend == "torch-compile"
    assert bench.duels == [("torch", "ort"), ("ort", "torch-compile")]


def test_what_has_come_since_is_measured_alone_against_the_winner(pipe, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates.CandidateMaker, "estimate_seconds", lambda _, name, __: {"ort": 1000.0}.get(name, 1.0))
    with shapecheck.accelerate(pipe, tmp_path, **SIZES | {"budget": 120}) as first:
        assert first.backend == "torch-compile"
    assert first.measured[-1].refusal.startswith("not begun: it takes about 1000 s, and 1")
    bench.times["ort"] = 5.0
    monkeypatch.setattr(candidates.CandidateMaker, "estimate_seconds", lambda *_: 1.0)
    monkeypatch.setattr(candidates.CandidateMaker, "is_made", lambda _, name, __: name == "ort")
    bench.duels.clear()
    with shapecheck.accelerate(pipe, tmp_path, **SIZES | {"budget": 120}) as second:
        assert second.backend == "ort"
    assert bench.duels == [("torch-compile", "ort")]
    assert [(one.backend, one.milliseconds) for one in second.measured] == [
        ("torch", 30.0), ("torch-compile", 10.0), ("ort", 5.0)
    ]  # fmt: skip


@pytest.mark.full
def test_a_winner_that_does_not_run_any_longer_is_measured_again(pipe, bench, tmp_path, caplog):
    shapecheck.accelerate(pipe, tmp_path, **SIZES)()
    bench.failures["torch-compile"] = ShapecheckError("the compiler is gone")
    with shapecheck.accelerate(pipe, tmp_path, **SIZES) as done:
        assert done.backend == "ort"
    assert "torch-compile does not run any longer: all is measured again" in caplog.messages


@pytest.mark.parametrize(
    ("expected", "left", "accelerated", "begun"),
    [
        (90, 120, False, True),
        (221, 120, False, True),  # SDXL: as long as nothing is faster than PyTorch
        (221, 120, True, False),
        (250, 120, False, False),
        (30, 30, True, True),
        (1, -5, True, False),
        (1e6, math.inf, True, True),
        (math.nan, 120, True, False),
    ],
)
def test_one_is_begun_if_it_is_expected_to_be_ready_in_time(expected, left, accelerated, begun):
    reason = explain_not_begun(expected, left, accelerated=accelerated)
    assert (not reason) is begun


def test_the_most_gain_for_a_second_comes_first(pipe, tmp_path, monkeypatch):
    maker = make_maker(tmp_path)
    models = (pipe.unet, pipe.controlnet)
    assert maker.order_candidates(torch.device("cpu"), models) == ("ort", "torch-compile")
    assert maker.order_candidates(torch.device("cuda"), models)[0] == "torch-compile"
    monkeypatch.setattr(export_cache.ExportCache, "is_exported", True)
    monkeypatch.setattr(export_cache.ExportCache, "has_engine", lambda *_: True)
    assert maker.order_candidates(torch.device("cuda"), models)[0] == "trt", "its engines are there"
    assert maker.is_made("trt", models) and not maker.is_made("ort-trt", models)


# what is right


def test_weights_are_the_very_same_after_the_reference(pipe, tmp_path):
    pipe.unet.half()
    pipe.controlnet.half()
    maker = make_maker(tmp_path)
    inputs = measure.make_inputs(maker, pipe.unet, [pipe.controlnet], shapecheck.Geometry(2, 9, 13))
    tensors = (*pipe.unet.parameters(), *pipe.controlnet.parameters())
    before = {tensor: (tensor.data_ptr(), tensor.dtype) for tensor in tensors}
    reference = measure.compute_reference((pipe.unet, (pipe.controlnet,)), inputs)
    assert before == {tensor: (tensor.data_ptr(), tensor.dtype) for tensor in before}
    assert reference.precision == "float32"
    names = [f"ControlNet 1, {slot}" for slot in ("down_block_residual_00", "down_block_residual_01", "mid_block_residual")]
    assert list(reference.expected) == [*names, "the image with control on", "the image with control off"]
    with torch.no_grad():
        own = inputs.compute_outputs((pipe.unet, (pipe.controlnet,)))
    right, text = measure.check_outputs(own, reference)
    assert right, text
    for name in own:
        spoilt = dict(own)
        spoilt[name] = torch.full_like(own[name], math.nan)
        assert not measure.check_outputs(spoilt, reference)[0]
    name = "the image with control on"
    spoilt = own | {name: reference.expected[name] + 8 * reference.own[name]}
    assert [measure.check_outputs(spoilt, reference, room=room)[0] for room in (1.0, 3.0)] == [False, True]
    own["the image with control on"] = own["the image with control off"]
    assert measure.check_outputs(own, reference) == (False, measure.check_outputs(own, reference)[1])


def test_without_memory_for_it_pytorchs_own_precision_is_the_reference_with_twice_the_tolerance(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure_free_memory", lambda: 0)
    maker = make_maker(tmp_path)
    inputs = measure.make_inputs(maker, pipe.unet, [], shapecheck.Geometry(2, 9, 13))
    reference = measure.compute_reference((pipe.unet, ()), inputs)
    assert (reference.precision, reference.tolerance) == ("float32", 8.0)
    assert measure.check_outputs(dict(reference.expected), reference)[0]
    doubled = {name: 2 * value for name, value in reference.expected.items()}
    assert not measure.check_outputs(doubled, reference)[0]


def test_frames_are_timed_in_turns_until_there_are_enough(pipe, tmp_path):
    """With real clocks: no time is asserted."""
    maker = make_maker(tmp_path)
    inputs = measure.make_inputs(maker, pipe.unet, [pipe.controlnet] * 2, shapecheck.Geometry(1, 9, 13))
    played = []

    class Counted(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, **arguments):
            played.append((self.name, "down_block_additional_residuals" in arguments))
            return pipe.unet(**arguments)

    both = {name: (Counted(name), (pipe.controlnet,) * 2) for name in ("torch", "other")}
    times = measure.time_in_turns(both, inputs, torch.device("cpu"))
    assert all(0 < value < math.inf for value in times.values())
    assert played[:4] == [("torch", True)] * 2 + [("other", True)] * 2
    assert played[4:6] == [("torch", True), ("other", True)]


@pytest.mark.gpu
def test_on_a_gpu_the_fastest_is_right_and_the_next_start_measures_nothing(tmp_path, monkeypatch, caplog):
    """With real compilers: a minute or two. `-s --log-cli-level INFO` shows what is measured."""
    caplog.set_level(logging.INFO, "shapecheck")
    unet = small.unet(**small.SHALLOW).half().to("cuda")
    pipe = SimpleNamespace(unet=unet, controlnet=small.controlnet(unet).half().to("cuda"))
    originals = pipe.unet, pipe.controlnet
    inputs = measure.make_inputs(make_maker(tmp_path), *(originals[0], [originals[1]]), shapecheck.Geometry(2, 9, 13))
    reference = measure.compute_reference((originals[0], originals[1:]), inputs)
    options = SIZES | {"budget": 120.0}
    with shapecheck.accelerate(pipe, tmp_path, **options) as done:
        print(done)
        (eager,) = [one.milliseconds for one in done.measured if one.backend == "torch"]
        (winner,) = [one for one in done.measured if one.backend == done.backend]
        assert winner.backend == "torch" or (winner.right and winner.milliseconds < eager)
        with torch.no_grad():
            right, verdict = measure.check_outputs(inputs.compute_outputs((pipe.unet, (pipe.controlnet,))), reference)
        assert right, verdict
    assert (pipe.unet, pipe.controlnet) == originals
    assert {parameter.device.type for model in originals for parameter in model.parameters()} == {"cuda"}
    forbid(monkeypatch, "compute_reference", "time_in_turns", "check_outputs")
    with shapecheck.accelerate(pipe, tmp_path, **options) as again:
        assert (again.backend, again.measured[0]) == (done.backend, done.measured[0])
