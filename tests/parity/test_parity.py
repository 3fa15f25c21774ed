"""Planted faults that shapes cannot show: each is caught and named by its own check, and a healthy file passes in all.

What is judged of a run's numbers is in test_evaluate.py; here are files, PyTorch and ONNX Runtime.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import engines
import exports
import full_size
import onnx_files
import openings
import parity_faults as faults
import pytest
import small
import torch
from diffusers.models.activations import GEGLU
from onnx_files import bake, exchange, planted, unconsume
from parity_runs import NAMES, SLOTS, failed, kinds, run_side
from peak import peak_of

from shapecheck import Geometry, ShapecheckError, doctor, presets
from shapecheck.models.forward_call import build_arguments
from shapecheck.observe.subject import TorchModel
from shapecheck.parity import runners
from shapecheck.parity.artefacts import read_files
from shapecheck.parity.cases import ForwardCase, InputGenerator, refuse_zeros
from shapecheck.parity.plan import choose_geometries, plan_checks
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.results import KINDS
from shapecheck.parity.run import ParityRun
from shapecheck.parity.search import search_file
from shapecheck.runtime import compiled_code
from shapecheck.runtime.compiled_session import CompiledSession
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.runtime.torch_session import TorchSession
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range, profile_of
from shapecheck.tensorrt.record import BuildOptions, BuildRequest

SIZE = Geometry(2, 9, 14, 7)
ONE_SIZE = (Range(SIZE, SIZE, SIZE),)
VARIED = [f"varied rows {number}" for number in (1, 2, 3)]
"""The calls of `SIZE` whose two rows differ in all that is varied."""
SHAPES = [(8, 1), (8, 1), (8, 2), (8, 2), (8, 4), (8, 4), (8, 8), (16, 8), (16, 8)]
"""Channels and stride: the first six are three pairs of equal shape."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def model():
    return small.unet(**onnx_files.DEEP)


@pytest.fixture(scope="module")
def exported(folder):
    return engines.exported(folder / "healthy.onnx", onnx_files.DEEP)


@pytest.fixture(scope="module")
def healthy(exported):
    return exported[0]


@pytest.fixture(scope="module")
def contract(exported):
    assert [(slot.channels, slot.stride) for slot in exported[1].slots] == SHAPES
    return exported[1]


@pytest.fixture(scope="module")
def xl(folder):
    return small.unet(**onnx_files.XL), engines.exported(folder / "xl.onnx", onnx_files.XL)[0]


def side(model, path, ranges=ONE_SIZE, *, seed=0, **given):
    return run_side(ParityRequest(model, path, seed=seed), ranges, **given)


def test_a_healthy_file_passes_in_all(model, healthy):
    report = ParityRun(ParityRequest(model, healthy, backends=("ort", "torch"))).report()
    assert report.passes, report
    assert report.verdict == "PARITY"
    assert report.reference == f"PyTorch float64 on {'cuda' if torch.cuda.is_available() else 'cpu'}"
    for found in report.sides:
        assert {each.check.kind for each in found.results} == set(KINDS) - {"rounding"}
        assert {each.status for each in found.results} == {"passed"}, found.results
        assert found.divergence is None
        judged = [each for each in found.results if each.check.kind in ("case", "slot", "input")]
        assert all(0 < each.verdict.own < 1e-5 and each.verdict.absolute.difference <= each.verdict.allowed for each in judged)
        acting = [each for each in found.results if each.check.kind in ("slot", "input")]
        assert all(abs(each.effect.strength - 1) < 1e-4 and each.effect.cosine > 0.9999 for each in acting)
        assert all(each.seconds > 0 for each in acting)
    assert report.sides[0].ran.provider == "CPUExecutionProvider"
    assert {each.batch for each in report.geometries} == {1, 2, 6}


def exchange_downs(contract, values):
    arguments = build_arguments(contract, values)
    arguments["down_block_additional_residuals"].reverse()
    return arguments


@pytest.mark.parametrize("build", [pytest.param(build_arguments, marks=pytest.mark.full), exchange_downs])
def test_a_compiled_model_is_proven_slot_by_slot(build, monkeypatch):
    monkeypatch.setattr(runners, "CompiledSession", partial(CompiledSession, compiler="eager"))
    monkeypatch.setattr(compiled_code, "build_arguments", build)
    monkeypatch.setattr(doctor, "backend", lambda name: doctor.Backend(name, True, ""))
    found = ParityRun(ParityRequest(small.unet(**small.TINY), backends=("torch-compile",)), ranges=ONE_SIZE).side(
        "torch-compile"
    )
    assert found.ran.provider == "torch.compile"
    assert found.ran.device.partition(" ")[0] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    if build is build_arguments:
        assert {each.status for each in found.results} == {"passed"}, found.results
        assert {each.check.kind for each in found.results} >= {"case", "slot", "input", "switch"}
    else:
        wrong = failed(found)[f"torch-compile/{SLOTS[0]}"]
        assert wrong.startswith("down_block_residual_00 acts where down_block_residual_01 belongs")


def test_slots_exchanged(model, healthy, folder):
    path = planted(healthy, folder / "exchanged.onnx", exchange(NAMES[2], NAMES[3]))
    with openings.counted() as counter:
        found = side(model, path)
    assert (counter["parsed"], counter["exchanged.onnx"]) == (1, 1)
    wrong = failed(found)
    assert "down_block_residual_02 acts where down_block_residual_03 belongs (down_blocks.1.resnets.0)" in wrong[SLOTS[2]]
    assert "down_block_residual_03 acts where down_block_residual_02 belongs (down_blocks.0.downsamplers.0)" in wrong[SLOTS[3]]
    assert kinds(found) == {"slot": 2, "contract": 1, "case": 5}
    assert found.divergence.module == "down_blocks.0.downsamplers.0"
    assert found.divergence.slot == NAMES[2]


@pytest.mark.parametrize("name", [pytest.param(NAMES[5], marks=pytest.mark.full), "mid_block_residual"])
def test_a_slot_dropped_and_mid_ignored(model, healthy, folder, name):
    found = side(model, planted(healthy, folder / f"no {name}.onnx", unconsume(name)))
    assert failed(found)[f"slot[{name}]"] == f"{name} changes nothing: what the ControlNet gives there is lost"
    assert kinds(found) == {"slot": 1, "contract": 1, "case": 5}
    assert found.divergence.slot == name


def test_an_engine_s_record_and_its_onnx_file_are_read_once(model, healthy, contract, tmp_path):
    names = tuple((name, name) for name in contract.input_rules)
    files = ("sha256:onnx", "sha256:weights", "")
    profiles = (profile_of(contract, ONE_SIZE[0]),)
    built = BuildRequest(contract, profiles, names, ("out_sample",), *files, BuildOptions(), "10.0", "a GPU")
    request = ParityRequest(model, healthy, engines.recorded(tmp_path / "unet.plan", built))
    with openings.counted() as counter:
        assert request.what_runs == ("ort", "trt")
        assert {check.backend for check in ParityRun(request).checks} == {"ort", "trt"}
    assert (counter["unet.plan.shapecheck.json"], counter["healthy.onnx"], counter["parsed"]) == (1, 1, 1)


def test_what_cannot_apply_to_an_engine_is_not_planned(model, healthy, contract, tmp_path):
    names = tuple((name, name) for name in contract.input_rules)
    profiles = (profile_of(contract, Range(*[Geometry(1, 9, 14, 7)] * 3)),)
    files = ("sha256:onnx", "sha256:weights", "")
    built = BuildRequest(contract, profiles, names, ("out_sample",), *files, BuildOptions(), "10.0", "a GPU")
    engine = engines.recorded(tmp_path / "unet.plan", built)
    both = ParityRun(ParityRequest(model, healthy, engine)).checks
    assert set(KINDS) - {check.kind for check in both if check.backend == "ort"} == {"rounding"}  # of half precisions
    assert set(KINDS) - {check.kind for check in both if check.backend == "trt"} == {"precision", "cfg", "rounding"}
    alone = ParityRun(ParityRequest(model, engine=engine)).checks
    assert set(KINDS) - {check.kind for check in alone} == {"precision", "cfg", "weights", "rounding"}


def test_a_slot_scaled(model, healthy, folder):
    found = side(model, planted(healthy, folder / "scaled.onnx", faults.scaled(NAMES[5], 0.9)))
    assert failed(found)[SLOTS[5]] == f"{NAMES[5]} acts as if 0.900 of it were given"
    assert kinds(found)["slot"] == 1


@pytest.mark.full
def test_height_and_width_exchanged_in_a_buffer(model, healthy, folder):
    found = side(model, planted(healthy, folder / "reshaped.onnx", faults.reshaped(*NAMES)))
    wrong = failed(found)
    assert all(
        f"{name} acts with height and width exchanged" in wrong[f"slot[{name}]"] for name in NAMES if name not in NAMES[6:]
    )
    assert "height and width of the residuals are exchanged" in wrong[f"case[{SIZE}, control on]"]
    assert kinds(found)["input"] == 0


@pytest.mark.full
def test_height_and_width_exchanged_so_that_only_squares_run(model, healthy, folder):
    found = side(model, planted(healthy, folder / "transposed.onnx", faults.transposed(*NAMES)))
    wrong = failed(found)
    assert all("acts with height and width exchanged" in wrong[f"slot[{name}]"] for name in NAMES)
    told = "height and width of the residuals are exchanged, as a square size shows; ONNX Runtime cannot run this call: "
    assert wrong[f"case[{SIZE}, control on]"].startswith(told)


@pytest.mark.full
def test_the_halves_of_the_batch_exchanged(model, healthy, folder):
    found = side(model, planted(healthy, folder / "halves.onnx", faults.halves_exchanged(*NAMES)))
    wrong = failed(found)
    assert wrong["cfg"] == "residuals given in the first half of the batch act in the second: the halves are exchanged"
    assert wrong[f"case[{SIZE}, control on]"].startswith("the halves of the residuals are exchanged; ")
    assert kinds(found)["slot"] == kinds(found)["input"] == 0


def test_the_timestep_baked(model, healthy, folder):
    found = side(model, planted(healthy, folder / "timestep.onnx", faults.frozen("timestep", 500)))
    assert failed(found)["input[timestep]"] == "timestep changes nothing: it is baked into the file"
    assert kinds(found)["input"] == 1
    assert kinds(found)["slot"] == 0


@pytest.mark.full
def test_pooled_text_baked_as_zeros(xl, folder):
    model, path = xl
    found = side(model, planted(path, folder / "text.onnx", bake("text_embeds")))
    assert failed(found)["input[text_embeds]"] == "text_embeds changes nothing: it is baked into the file as zeros"
    assert failed(found)[f"case[{SIZE}, control off]"].startswith("text_embeds is taken as zeros; ")
    assert kinds(found)["input"] == 1


@pytest.mark.full
def test_a_channel_of_nan(model, healthy, folder):
    found = side(model, planted(healthy, folder / "nan.onnx", faults.not_a_number(2, 4)))
    cells = SIZE.batch * SIZE.height * SIZE.width
    for where in (f"case[{SIZE}, control off]", f"case[{SIZE}, control on]"):
        assert failed(found)[where] == f"{cells} NaN and 0 Inf among {4 * cells} values, in channel 2"
    assert set(kinds(found)) == {"case"}


def test_weights_of_another_checkpoint(healthy):
    torch.manual_seed(5)
    other = small.unet(**onnx_files.DEEP)
    with torch.no_grad():
        other.mid_block.resnets[0].conv1.weight.mul_(1.001)
    found = side(other, healthy)
    assert failed(found)["weights"].endswith("tensors are not the model's: mid_block.resnets.0.conv1.weight")
    assert failed(found)["weights"].startswith("1 of ")
    assert found.divergence.module == "mid_block"


@pytest.mark.full
def test_a_layer_in_the_wrong_precision(model, healthy, folder):
    found = side(model, planted(healthy, folder / "half.onnx", faults.in_half("Conv", 7)))
    assert failed(found)["precision"].startswith("3 in less than float32: cast to float16 at ")
    assert "largest difference " in failed(found)[f"case[{SIZE}, control off]"]
    assert found.divergence.module == "down_blocks.2.resnets.0"
    assert found.divergence.slot == NAMES[5]
    off = next(each for each in found.results if each.check.where == f"{SIZE}, control off")
    assert 5 * off.verdict.own < off.verdict.absolute.difference < 1e-3


class Stale:
    """A session that keeps residuals it should not: those of the call before, or of the last call that had any."""

    def __init__(self, session, *, always):
        self._session, self._always, self._kept = session, always, None

    def __getattr__(self, name):
        return getattr(self._session, name)

    def __call__(self, inputs):
        own = {name: each for name, each in inputs.items() if "residual" in name}
        on = any(bool(each.any()) for each in own.values())
        given = own if self._kept is None or (on and not self._always) else self._kept
        self._kept = own if on or self._always else self._kept
        return self._session({**inputs, **given})


@pytest.mark.full
@pytest.mark.parametrize("always", [False, True])
def test_residuals_of_an_earlier_call_kept(model, healthy, always):
    def opener(backend, file):
        return Stale(OnnxSession.open(file.path), always=always)

    found = side(model, healthy, opener=opener)
    told = "step 2, control off: the image is that of step 1, control on with frame 0: residuals of an earlier call are kept"
    assert failed(found)["switch"] == told


def test_a_size_for_which_the_gpu_has_no_memory_is_a_failure_of_that_size():
    class Small(TorchSession):
        def __call__(self, inputs):
            if len(inputs["sample"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(inputs)

    def opener(_backend, file):
        return Small(unet, file.contract)

    unet = small.unet(**small.TINY)
    ranges = tuple(Range(*[Geometry(batch, 9, 9, 7)] * 3) for batch in (1, 2))
    (found,) = ParityRun(ParityRequest(unet, backends=("torch",)), ranges=ranges, opener=opener).report().sides
    assert {name: reason for name, reason in failed(found).items() if "CUDA" in reason} == {
        f"torch/case[batch 2, latent 9×9, {varied}]": "CUDA out of memory" for varied in VARIED
    }
    assert {each.status for each in found.results if each.check.kind in ("input", "slot", "switch")} == {"passed"}


def test_a_model_for_which_the_gpu_has_no_memory_is_told_with_what_takes_less(monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TorchModel, "load", load)
    told = "does not suffice for PyTorch's side; smaller sizes take less, .*: CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(ShapecheckError, match=told):
        ParityRun(ParityRequest(small.unet(**small.TINY), backends=("torch",)), ranges=ONE_SIZE).report()


@pytest.mark.full
def test_a_backend_that_fell_back_to_the_cpu(model, healthy):
    def opener(backend, file):
        session = OnnxSession.open(file.path, backend=backend, strict=False)
        session.device = torch.device("cpu")
        return session

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: nothing falls back")
    request = ParityRequest(model, healthy, backends=("ort-cuda",))
    (found,) = ParityRun(request, ranges=ONE_SIZE, opener=opener).report().sides
    told = {str(each.check): each.reason for each in found.failed}
    assert told == {"ort-cuda/provider": "CPUExecutionProvider runs, where ort-cuda is CUDAExecutionProvider"}
    (refused,) = ParityRun(request, ranges=ONE_SIZE).report().sides
    (only,) = refused.failed
    assert only.check.kind == "provider"
    assert only.reason.startswith("ort-cuda cannot run here: ")
    with pytest.raises(ShapecheckError, match="ort-cuda was requested and ONNX Runtime fell back to CPUExecutionProvider"):
        OnnxSession.open(healthy, backend="ort-cuda")


@pytest.mark.full
def test_an_input_that_the_file_does_not_have(xl, folder):
    model, path = xl
    missing = planted(path, folder / "missing.onnx", bake("text_embeds", sized_by="time_ids"), onnx_files.drop("text_embeds"))
    assert failed(side(model, missing))["input[text_embeds]"].startswith("the file has no input for text_embeds: ")


def test_zero_residuals_prove_nothing(contract):
    def untrained(base, frame):
        rows, _, height, width = base["sample"].shape
        return {name: torch.zeros(shape) for name, shape in contract.shapes(Geometry(rows, height, width)).items()}

    with pytest.raises(ShapecheckError, match="every residual is zero, so nothing would be proven"):
        InputGenerator(contract, 0, untrained)(ForwardCase(SIZE, 0))
    refuse_zeros({"a": torch.zeros(2), "b": torch.tensor([0.0, math.nan])})


@pytest.mark.full
def test_a_real_controlnet_s_residuals(model, healthy):
    net = small.controlnet(model)

    def emit(base, frame):
        generator = torch.Generator().manual_seed(frame)
        image = 20 * torch.rand(len(base["sample"]), 3, *(8 * side for side in base["sample"].shape[-2:]), generator=generator)
        with torch.no_grad():
            downs, mid = net(**base, controlnet_cond=image, return_dict=False)
        return dict(zip(NAMES, (*downs, mid), strict=True))

    found = side(model, healthy, emit=emit)
    assert {each.status for each in found.results} == {"passed"}, found.results


def test_what_is_drawn(contract):
    generate = InputGenerator(contract, 3)
    on, off = generate(ForwardCase(SIZE, 0)), generate(ForwardCase(SIZE))
    assert on.keys() == off.keys() == {"sample", "timestep", "encoder_hidden_states", *NAMES}
    assert all(bool(on[name].any()) and not bool(off[name].any()) for name in NAMES)
    assert all(torch.equal(on[name], off[name]) for name in ("sample", "timestep", "encoder_hidden_states"))
    assert len(set(on["timestep"].tolist())) == SIZE.batch
    assert all(float(each) % 1 for each in on["timestep"])
    assert all(not torch.equal(each[0], each[1]) for each in (on["sample"], *(on[name] for name in NAMES)))
    again, other = InputGenerator(contract, 3)(ForwardCase(SIZE, 0)), InputGenerator(contract, 4)(ForwardCase(SIZE, 0))
    assert all(torch.equal(on[name], again[name]) for name in on)
    assert not any(torch.equal(on[name], other[name]) for name in NAMES)
    assert not any(torch.equal(on[name], generate(ForwardCase(SIZE, 1))[name]) for name in NAMES)
    half = generate(ForwardCase(SIZE, 0, half=True))
    assert all(torch.equal(half[name][0], on[name][0]) and not half[name][1].any() for name in NAMES)
    changed = generate(ForwardCase(SIZE, perturbed=NAMES[1]))
    assert [name for name in changed if not torch.equal(changed[name], off[name])] == [NAMES[1]]
    small_, large = generate(ForwardCase(SIZE, 0, pooled=True), expanded=False), generate(ForwardCase(SIZE, 0, pooled=True))
    assert all(
        small_[name].shape[2:] == (1, 1) and torch.equal(small_[name].expand_as(large[name]), large[name]) for name in NAMES
    )


def test_every_input_of_sdxl_is_perturbed_within_what_it_may_be():
    contract = presets.contract("sdxl")
    generate, off = InputGenerator(contract, 0), InputGenerator(contract, 0)(ForwardCase(SIZE))
    for name in ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"):
        changed = generate(ForwardCase(SIZE, perturbed=name))
        assert [each for each in changed if not torch.equal(changed[each], off[each])] == [name]
    sizes = generate(ForwardCase(SIZE, perturbed="time_ids"))["time_ids"]
    assert bool((sizes >= off["time_ids"]).all())  # sizes in pixels: no less than before, and never negative
    assert bool((off["time_ids"] >= 64).all())


def test_sizes_of_a_run(contract):
    sizes = Range(Geometry(1, 8, 16), Geometry(2, 16, 16), Geometry(4, 32, 24))
    between = Geometry(3, 21, 21)
    assert choose_geometries(contract, [sizes]) == (*sizes.geometries, between)
    fixed = Range(SIZE, SIZE, SIZE)
    assert choose_geometries(contract, [fixed, sizes]) == (SIZE, *sizes.geometries, between)


# Features of a T2I-Adapter, and ControlNets


@pytest.fixture(scope="module")
def fed(folder):
    """A UNet whose file takes the features of SDXL's T2I-Adapter too, the last two of one shape."""
    config = onnx_files.DEEP | {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
    }
    path, contract = engines.exported(folder / "fed.onnx", config, adapter=True)
    assert [(slot.channels, slot.stride) for slot in contract.features] == [(8, 2), (16, 2), (24, 4), (24, 4)]
    return small.unet(**config), path


FEATURES = [f"down_intrablock_residual_{index:02}" for index in range(4)]


def test_every_feature_is_a_slot(fed):
    found = side(*fed)
    assert {each.status for each in found.results} == {"passed"}, found.results
    assert [each.check.where for each in found.results if each.check.kind == "slot"] == [*NAMES[:6], NAMES[-1], *FEATURES]


def test_features_exchanged(fed, folder):
    model, path = fed
    found = side(model, planted(path, folder / "features.onnx", exchange(FEATURES[2], FEATURES[3])))
    assert f"{FEATURES[2]} acts where {FEATURES[3]} belongs" in failed(found)[f"slot[{FEATURES[2]}]"]
    assert f"{FEATURES[3]} acts where {FEATURES[2]} belongs" in failed(found)[f"slot[{FEATURES[3]}]"]
    assert kinds(found) == {"slot": 2, "contract": 1, "case": 5}
    assert found.divergence is not None


@pytest.mark.parametrize("edits", [(unconsume(FEATURES[1]),), (unconsume(FEATURES[1]), onnx_files.drop(FEATURES[1]))])
def test_a_feature_ignored_or_baked(fed, folder, edits):
    model, path = fed
    found = side(model, planted(path, folder / "ignored.onnx", *edits))
    told = failed(found)[f"slot[{FEATURES[1]}]"]
    assert told in (
        f"{FEATURES[1]} changes nothing: what the T2I-Adapter gives there is lost",
        f"the file has no input for {FEATURES[1]}: it is baked into it, or left out",
    )
    assert ("changes nothing" in told) == (len(edits) == 1)
    assert kinds(found) == {"slot": 1, "contract": 1, "case": 5}


def real_controlnet():
    """Return a ControlNet that sees its image, as a fresh one does not."""
    model = small.controlnet(small.unet(**small.SHALLOW))
    torch.nn.init.normal_(model.controlnet_cond_embedding.conv_out.weight)
    return model


@pytest.fixture(scope="module")
def net(folder):
    """A ControlNet of five residuals, two of one shape, and its file."""
    model = real_controlnet()
    return model, onnx_files.controlnet_written(folder / "net.onnx", model, latent=(17, 25))


EMITTED = [f"down_block_residual_{index:02}" for index in range(4)] + ["mid_block_residual"]


def test_every_residual_of_a_controlnet_is_judged(net):
    found = side(*net)
    assert {each.status for each in found.results} == {"passed"}, found.results
    cases = [each for each in found.results if each.check.kind == "case"]
    wheres = [f"{SIZE}", *(f"{SIZE}, {each}" for each in VARIED)]
    assert [each.check.where for each in cases] == [f"{where}, {name}" for where in wheres for name in EMITTED]
    assert all(0 < each.verdict.own < 1e-5 and each.verdict.absolute.difference <= each.verdict.allowed for each in cases)
    inputs = [each for each in found.results if each.check.kind == "input"]
    assert {each.check.where for each in inputs} > {"sample", "timestep", "controlnet_cond", "conditioning_scale"}
    assert all(abs(each.effect.strength - 1) < 1e-4 for each in inputs)


@pytest.mark.parametrize(
    "names", [[f"input_control_{index:02}" for index in range(4)] + ["input_control_middle"], list("abcde")]
)
def test_residuals_are_known_by_their_names_or_by_their_order(net, folder, names):
    model, path = net

    def edit(graph):
        for value, name in zip(graph.graph.outputs, names, strict=True):
            value.name = name

    file = planted(path, folder / f"{names[0]}.onnx", edit)
    (known,) = read_files(ParityRequest(model, file), TorchModel(model)).values()
    assert known.outputs == dict(zip(EMITTED, names, strict=True))


def test_a_file_without_any_of_the_residuals_is_refused(net, folder):
    model, path = net

    def edit(graph):
        for index, value in enumerate(graph.graph.outputs):
            value.name = f"input_control_{index + 70:02}"

    file = planted(path, folder / "others.onnx", edit)
    with pytest.raises(ShapecheckError, match=r"others\.onnx has no output that is a residual of the model"):
        read_files(ParityRequest(model, file), TorchModel(model))


def test_residuals_of_one_shape_exchanged_in_the_outputs(net, folder):
    model, path = net

    def edit(graph):
        first, second = graph.graph.outputs[:2]
        first.name, second.name = "between", first.name
        first.name = EMITTED[1]
        graph.graph.outputs[:2] = [second, first]

    found = side(model, planted(path, folder / "exchanged outputs.onnx", edit))
    wrong = failed(found)
    for one, other in (EMITTED[:2], EMITTED[1::-1]):
        assert wrong[f"case[{SIZE}, {one}]"].startswith(f"it holds what belongs in {other}; largest difference ")
    assert kinds(found)["case"] == 2 * (1 + len(VARIED))
    assert not {each.check.where.rpartition(", ")[2] for each in found.failed} & set(EMITTED[2:])
    assert found.divergence is None


def test_a_residual_that_is_wrong_missing_or_without_its_scale(net, folder):
    model, path = net
    found = side(model, planted(path, folder / "scale.onnx", faults.frozen("conditioning_scale", 1)))
    told = "conditioning_scale changes nothing: it is baked into the file, in down_block_residual_00"
    assert failed(found)["input[conditioning_scale]"] == told
    assert kinds(found)["case"] == len(EMITTED) * (1 + len(VARIED))

    def cut(graph):
        graph.graph.outputs.pop()

    found = side(model, planted(path, folder / "cut.onnx", cut))
    assert failed(found)[f"case[{SIZE}, {EMITTED[-1]}]"] == f"the file has no output for {EMITTED[-1]}: it is left out"
    assert kinds(found)["case"] == 1 + len(VARIED)
    other = real_controlnet()
    with torch.no_grad():
        other.controlnet_down_blocks[3].weight.mul_(1.001)
    found = side(other, path)
    wrong = [each.check.where.rpartition(", ")[2] for each in found.failed if each.check.kind == "case"]
    assert wrong == [EMITTED[3]] * (1 + len(VARIED))
    assert failed(found)["weights"].endswith("are not the model's: controlnet_down_blocks.3.weight")


def test_a_controlnet_whose_residuals_are_zero_proves_nothing(net):
    model, path = net
    zero = real_controlnet()
    torch.nn.init.zeros_(zero.controlnet_down_blocks[2].weight)
    zero = r"down_block_residual_02 is zero everywhere at batch 2, .*, in float64, so nothing can be compared"
    with pytest.raises(ShapecheckError, match=zero):
        side(zero, path)
    with pytest.raises(ShapecheckError, match="is a ControlNet and takes no residuals: --controlnet is for UNets"):
        ParityRun(ParityRequest(model, path), emit=lambda base, frame: {})


# Other seeds, precisions, files and sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_is_left_unjudged_in_a_half_precision(dtype):
    report = ParityRun(ParityRequest(small.unet(**small.TINY).to(dtype), backends=("torch",)), ranges=ONE_SIZE).report()
    assert {each.status for each in report.sides[0].results} == {"passed"}, report.sides[0].results
    assert report.reference.startswith("PyTorch float32 on ")


def in_ten_bits(module):
    """Weights as integers of ten bits, one scale a tensor."""
    for weight in [weight for weight in module.parameters() if weight.ndim > 1]:
        step = weight.float().abs().max() / 511
        weight.copy_((weight.float() / step).round() * step)


def with_another_gelu(module):
    """It differs from the exact one by less than float16 can tell."""
    for part in module.modules():
        if isinstance(part, GEGLU):
            part.gelu = lambda value: torch.nn.functional.gelu(value, approximate="tanh")


def plan_rounding(*given):
    return tuple(plan for plan in plan_checks(*given) if plan.check.kind in ("case", "rounding"))


@pytest.mark.parametrize(("edit", "status"), [(in_ten_bits, "failed"), (with_another_gelu, "passed")])
def test_in_a_half_precision_all_values_together_show_what_the_worst_hides(edit, status):
    model = small.unet(**small.TINY).half()

    def open_edited(backend, file):
        module = copy.deepcopy(model)
        with torch.no_grad():
            edit(module)
        return TorchSession(module, file.contract)

    request = ParityRequest(model, backends=("torch",))
    (found,) = ParityRun(request, opener=open_edited, plan=plan_rounding, explain=False).report().sides
    assert {each.status for each in found.results if each.check.kind == "case"} == {"passed"}, found.results
    (rounding,) = [each for each in found.results if each.check.kind == "rounding"]
    assert rounding.status == status, rounding
    if status == "failed":
        assert 1.8 < rounding.rounding.times_own < 4
        told = (
            r"times PyTorch's own in float16 \(root mean square of \d+ calls\), 1\.8 times are allowed: something is computed"
        )
        assert re.search(told, rounding.reason)


def test_text_is_judged_as_loud_as_it_shows():
    """At its usual size attention is at random, and PyTorch's own rounding hides what the text does."""
    unet = small.unet(**small.TINY)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                weight.mul_(30)
    steps = []
    request = ParityRequest(unet.half(), backends=("torch",))
    report = ParityRun(request, ranges=ONE_SIZE, progress=lambda step, *_: steps.append(step)).report()
    assert {each.status for each in report.sides[0].results} == {"passed"}, report.sides[0].results
    assert any(re.search("computing with torch, .*encoder_hidden_states perturbed 0.* times as much", step) for step in steps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: small.unet(**onnx_files.DEEP),
        lambda: small.unet(**onnx_files.XL),
        lambda: small.unet(**small.SHALLOW, num_class_embeds=10),
        real_controlnet,
    ],
    ids=["deep", "xl", "labels", "controlnet"],
)
def test_nothing_is_left_unjudged_on_a_gpu(make, dtype):
    report = ParityRun(ParityRequest(make().to(dtype), backends=("torch-cuda",))).report()
    assert {each.status for each in report.sides[0].results} == {"passed"}, report.sides[0].results
    assert report.reference.endswith(" on cuda")


@pytest.mark.gpu
def test_on_cuda_a_dropped_slot_is_where_the_first_value_differs(model, healthy, folder, shapecheck_require):
    """In TF32 the first convolution would be."""
    shapecheck_require("ort-cuda")
    path = planted(healthy, folder / "dropped on cuda.onnx", unconsume(NAMES[5]))
    (found,) = ParityRun(ParityRequest(model, path, backends=("ort-cuda",)), ranges=ONE_SIZE).report().sides
    print(found.ran, failed(found), found.divergence, found.notes)
    assert failed(found)[f"ort-cuda/{SLOTS[5]}"].startswith(f"{NAMES[5]} changes nothing")
    assert found.divergence.slot == NAMES[5]


def statuses(found) -> set[str]:
    return {each.status for each in found.results}


def ratios(model, path, seeds: range) -> list[float]:
    """Return how many times PyTorch's own error that of ONNX Runtime is, in each case of each seed; all checks pass."""
    errors = []
    for seed in seeds:
        found = side(model, path, (), seed=seed)
        assert statuses(found) == {"passed"}, (seed, found.results)
        cases = [each.verdict for each in found.results if each.check.kind == "case"]
        errors += [verdict.absolute.difference / verdict.own for verdict in cases]
    return errors


@pytest.mark.full
@pytest.mark.parametrize(("config", "seeds"), [(onnx_files.DEEP, range(1, 3)), (onnx_files.XL, range(1))], ids=["deep", "xl"])
def test_no_false_alarm_over_a_few_seeds(tmp_path, config, seeds):
    path, _ = engines.exported(tmp_path / "unet.onnx", config)
    assert ratios(small.unet(**config), path, seeds)


@pytest.mark.nightly
@pytest.mark.parametrize("config", [onnx_files.DEEP, onnx_files.XL], ids=["deep", "xl"])
def test_no_false_alarm_over_twenty_seeds(tmp_path, config):
    path, _ = engines.exported(tmp_path / "unet.onnx", config)
    errors = ratios(small.unet(**config), path, range(20))
    print(f"errors of ONNX Runtime: {min(errors):.2f} to {max(errors):.2f} times PyTorch's own")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model and its own copy of the file made of it, beside the weights."""
    model = small.unet(**onnx_files.DEEP).half()
    made = exports.exported_once(model, dtype="float16").path
    folder = shutil.copytree(made.parent, tmp_path_factory.mktemp("half") / "model")
    return model, folder / made.name


@pytest.mark.full
def test_half_precision(half):
    found = side(*half, ())
    assert statuses(found) == {"passed"}, found.results
    assert found.ran.precision == "float16"


@pytest.mark.nightly
def test_half_precision_over_twenty_seeds(half):
    assert ratios(*half, range(20))


@pytest.mark.full
def test_faults_in_half_precision(half):
    model, path = half
    folder = path.parent  # where its weights lie
    exchanged = side(model, planted(path, folder / "exchanged.onnx", exchange(NAMES[2], NAMES[3])), ())
    assert f"acts where {NAMES[3]} belongs" in failed(exchanged)[SLOTS[2]]
    assert f"acts where {NAMES[2]} belongs" in failed(exchanged)[SLOTS[3]]
    assert kinds(exchanged)["slot"] == 2
    scaled = side(model, planted(path, folder / "scaled.onnx", faults.scaled(NAMES[5], 0.9)), ())
    assert next(iter(failed(scaled))) == SLOTS[5]
    assert 0.88 < float(failed(scaled)[SLOTS[5]].split(" acts as if ")[1].split(" of it ")[0]) < 0.92
    ignored = side(model, planted(path, folder / "ignored.onnx", unconsume("mid_block_residual")), ())
    assert failed(ignored)["slot[mid_block_residual]"].startswith("mid_block_residual changes nothing")
    assert kinds(scaled)["slot"] == kinds(ignored)["slot"] == 1
    for name in ("encoder_hidden_states", "timestep"):
        baked = side(model, planted(path, folder / f"{name} baked.onnx", faults.scaled(name, 0)), ())
        words = {
            "encoder_hidden_states": ": it is baked into the file",
            "timestep": " in this call; the image differs only at timestep 1 and above",
        }
        assert failed(baked)[f"input[{name}]"].startswith(f"{name} changes nothing{words[name]}")
        assert kinds(baked)["input"] == 1


@pytest.mark.full
def test_bfloat16_cannot_run_on_the_cpu_and_says_so():
    model = small.unet(**exports.LEAST).bfloat16()
    found = side(model, exports.exported_once(model, dtype="bfloat16").path)
    assert {each.check.kind for each in found.failed} == {"provider"}
    assert "Could not find an implementation for " in found.failed[0].reason  # in ONNX Runtime's words


@pytest.mark.full
def test_without_control():
    model = small.unet(**exports.LEAST)
    found = side(model, exports.exported_once(model, control=False).path)
    assert statuses(found) == {"passed"}
    assert {each.check.kind for each in found.results} == {"provider", "contract", "weights", "precision", "input", "case"}


@pytest.mark.full
def test_names_of_another_project():
    model = small.unet(**exports.LEAST)
    assert statuses(side(model, exports.exported_once(model, naming="streamdiffusion").path)) == {"passed"}


@pytest.mark.nightly
def test_sd15_at_its_real_size(tmp_path):
    """All 13 slots at 24×40 latents: within twelve gigabytes, and in minutes on two cores."""
    process = [sys.executable, str(Path(full_size.__file__)), "sd15", str(tmp_path), "100GB"]
    subprocess.run(process, check=True, capture_output=True)
    shapecheck = [sys.executable, "-m", "shapecheck"]
    path = tmp_path / "unet.onnx"
    subprocess.run([*shapecheck, "export", str(tmp_path), "-o", str(path)], check=True, capture_output=True)
    sizes = ("--sizes", "320x192", "--batch", "1:1:2")
    output, peak = peak_of(
        *("-m", "shapecheck", "parity", str(tmp_path), "--onnx", str(path)), *sizes, "--report", str(tmp_path / "report")
    )
    print(output, f"peak {peak / 2**30:.1f} GiB", sep="\n")
    assert peak <= 12e9
    record = json.loads((tmp_path / "report" / "parity.json").read_text(encoding="utf-8"))
    assert [(each["batch"], each["height"], each["width"]) for each in record["geometries"]] == [(1, 24, 40), (2, 24, 40)]
    (found,) = record["sides"]
    slots = [each for each in found["results"] if each["kind"] == "slot"]
    assert len(slots) == 13
    assert {each["status"] for each in found["results"]} == {"passed"}
    assert all(abs(each["effect"]["strength"] - 1) < 0.01 for each in slots)


@pytest.mark.full
def test_a_range_of_sizes(model, healthy):
    sizes = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(4, 33, 41))
    found = side(model, healthy, (sizes,))
    assert statuses(found) == {"passed"}
    assert len({each.geometry for each in found.results if each.check.kind == "case"}) == 4


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the engine built again may run")
def test_where_an_engine_differs_is_looked_for_in_its_onnx_file(tmp_path):
    """The engine is built again with marked outputs, for real; without a GPU it cannot run, which is said."""
    healthy, _ = engines.exported(tmp_path / "healthy.onnx", onnx_files.XL)
    faulty = planted(healthy, tmp_path / "faulty.onnx", unconsume("down_block_residual_01"))
    size = Geometry(2, 9, 14, 7)
    build_engine(faulty, tmp_path / "faulty.plan", profiles=Range(size, size, size), options=engines.RTX)
    model = TorchModel(small.unet(**onnx_files.XL))
    file = read_files(ParityRequest("", faulty, tmp_path / "faulty.plan", ("rtx",)), model)["rtx"]
    generate = InputGenerator(file.contract, 0)
    before = set(tmp_path.iterdir())
    found, notes = search_file(model, file, generate, ForwardCase(size, 0), "rtx", "float64", tolerance_factor=4, folder=None)
    assert (found.module, found.slot) == ("down_blocks.0.resnets.0", "down_block_residual_01")
    assert found.note == f"found in {faulty}, which the engine was built from, in ONNX Runtime on the CPU"
    assert len(notes) == 1
    assert notes[0].startswith("where it differs could not be found: this runs on an NVIDIA GPU")
    large = replace(file, record=replace(file.record, size=10**9))
    found, notes = search_file(model, large, generate, ForwardCase(size, 0), "rtx", "float64", tolerance_factor=4, folder=None)
    assert found.slot == "down_block_residual_01"
    assert notes == ("the engine is not built again with its values as outputs: that takes minutes at its size",)
    assert set(tmp_path.iterdir()) == before
