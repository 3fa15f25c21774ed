"""Weights exchanged in an engine. TensorRT is scripted here: what it computes afterwards is tested in test_gpu.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import engines
import exports
import numpy as np
import onnx
import pytest
import small
from click.testing import CliRunner
from loras import add_lora

import shapecheck
from shapecheck import BuildOptions, Geometry, ShapecheckError, profile_of, read_contract, rebind, refit
from shapecheck.cli import main
from shapecheck.models import weights
from shapecheck.onnx.file import OnnxFile
from shapecheck.pipelines.export_cache import ExportCache
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.check import compare_with_file
from shapecheck.tensorrt.process import EngineError
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.record import read_engine, record_of
from shapecheck.tensorrt.refitting import exchange_weights

REFITTABLE = BuildOptions("rtx", refittable=True)
SIZES = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(3, 33, 41))


@pytest.fixture
def scripted(monkeypatch):
    script = engines.ScriptedTensorRT()
    for module in ("build", "refit"):
        monkeypatch.setattr(f"shapecheck.tensorrt.{module}.EngineProcess", script)
    return script


@pytest.fixture
def unet():
    unet = small.unet(**exports.LEAST)
    add_lora(unet, "one", seed=1)
    return unet


@pytest.fixture
def plain(tmp_path):
    """A file of this very process: its digest of what the UNet computes is that of the test."""
    small.unet(**exports.LEAST).save_pretrained(tmp_path / "model" / "unet")
    return shapecheck.export(str(tmp_path / "model"), tmp_path / "model" / "unet.onnx").path


def build(file, path, options=REFITTABLE):
    return build_engine(file, path, profiles=[SIZES], options=options)


@pytest.mark.full
def test_an_engine_gets_the_weights_of_a_rebound_file_and_its_record_is_that_of_a_build(scripted, plain, unet, tmp_path):
    old = build(plain, tmp_path / "unet.plan")
    rebind(plain, unet, tmp_path / "rebound.onnx")
    new = refit(old.path, tmp_path / "rebound.onnx", tmp_path / "new.plan")
    record = read_engine(new.path)
    assert record == new.engine != old.engine
    file = OnnxFile(tmp_path / "rebound.onnx")
    assert compare_with_file(record, file).same and not compare_with_file(record, OnnxFile(plain)).same
    assert not compare_with_file(read_engine(old.path), file).same, "the engine that it was made of stays"
    again = build(tmp_path / "rebound.onnx", new.path)
    assert again.found, "a build of that file finds it"
    assert refit(new.path, plain).engine.request == old.engine.request


@pytest.mark.full
@pytest.mark.parametrize("source", ["live", "folder", "half"])
def test_an_engine_gets_the_weights_of_a_model_by_itself(scripted, plain, unet, tmp_path, source):
    file = exports.exported_once(small.unet(**exports.LEAST), dtype="float16").path if source == "half" else plain
    engine = build(file, tmp_path / "unet.plan").path
    rebind(file, unet, tmp_path / "rebound.onnx")
    model = unet
    if source == "folder":
        unet.fuse_lora()
        unet.unload_lora()
        unet.save_pretrained(tmp_path / "fused" / "unet")
        model = tmp_path / "fused"
    expected = weights.digest(OnnxFile(tmp_path / "rebound.onnx").tensors)
    assert refit(engine, model).engine.request.weights == expected
    by_model = engine.read_text(encoding="utf-8")
    refit(engine, tmp_path / "rebound.onnx")
    assert engine.read_text(encoding="utf-8") == by_model, "TensorRT was given the same"
    assert [path.name for path in tmp_path.glob(".shapecheck.*")] in ([], [".shapecheck.lock"])


@pytest.mark.full
def test_what_cannot_be_refitted_is_refused_and_the_engine_stays(scripted, plain, unet, tmp_path):
    fixed = build(plain, tmp_path / "fixed.plan", BuildOptions("rtx", compute_capabilities=("8.9",))).path
    with pytest.raises(ShapecheckError, match=r"fixed.plan was not built to be refitted: build it again, with --refittable"):
        refit(fixed, plain)
    engine = build(plain, tmp_path / "unet.plan").path
    before = engine.read_bytes(), record_of(engine).read_bytes()
    other = onnx.load(plain, load_external_data=False)
    other.graph.node[0].name = "another"
    onnx.save(other, plain.with_name("other.onnx"))
    with pytest.raises(ShapecheckError, match=r"other.onnx is not the graph that the engine was built from"):
        refit(engine, plain.with_name("other.onnx"))
    unet.mid_block.resnets[0].output_scale_factor = 2.0
    with pytest.raises(ShapecheckError, match="is not the model that the engine was made of"):
        refit(engine, unet)
    with pytest.raises(ShapecheckError, match="the name of an engine ends in"):
        refit(engine, plain, tmp_path / "engine.onnx")
    scripted.failure = EngineError("refit", "1 weights have no name in the engine", ())
    with pytest.raises(EngineError, match=r"TensorRT cannot refit .*\n  1 weights have no name.*\n  build it again"):
        refit(engine, plain)
    assert (engine.read_bytes(), record_of(engine).read_bytes()) == before
    engine.write_bytes(b"another engine")
    with pytest.raises(ShapecheckError, match="is not the engine of its record"):
        refit(engine, plain)


@pytest.mark.full
def test_the_command_says_what_the_engine_holds_now(scripted, plain, unet, tmp_path):
    engine = build(plain, tmp_path / "unet.plan").path
    rebind(plain, unet, tmp_path / "rebound.onnx")
    result = CliRunner().invoke(main, ["refit", str(engine), "--model", str(tmp_path / "rebound.onnx")])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "REFITTED: in 0 s")
    result = CliRunner().invoke(main, ["refit", str(engine), "--model", str(plain), "--format", "json"])
    assert json.loads(result.stdout)["weights_digest"] == weights.digest(OnnxFile(plain).tensors)


@pytest.mark.full
def test_what_accelerate_keeps_is_rebound_and_refitted_for_other_weights(scripted, unet, tmp_path):
    profiles = None
    paths = []
    for scale in (1.0, 0.5):
        unet.set_adapters("one", scale)
        cache = ExportCache(unet, tmp_path, lambda *_: None, refittable=True)
        assert cache.needs_export is (profiles is None)
        contract = read_contract(cache.export_onnx())
        profiles = (profile_of(contract, SIZES),)
        assert cache.has_engine("rtx", profiles) is bool(paths)
        paths.append(cache.build_engine("rtx", profiles))
        assert cache.has_engine("rtx", profiles)
        assert compare_with_file(read_engine(paths[-1]), OnnxFile(cache.path)).same
    assert ["refit" in job for job in scripted.jobs] == [False, True]
    assert len(set(paths)) == len({read_engine(path).digest for path in paths}) == 2
    assert not ExportCache(unet, tmp_path, lambda *_: None).has_engine("rtx", profiles), "which is not to be refittable"


class Kind(SimpleNamespace):
    """A dtype as TensorRT has them."""


FLOAT, HALF = Kind(name="FLOAT", itemsize=4), Kind(name="HALF", itemsize=2)


class ScriptedRefitter:
    """Stands in for TensorRT's: it knows two weights, and notes the bytes that it reads when it refits."""

    def __init__(self, engine, _logger):
        self.engine, self.given = engine, {}
        engine.refitter = self

    def get_all_weights(self):
        return list(self.engine.weights)

    def get_weights_prototype(self, name):
        return self.engine.weights[name]

    def set_named_weights(self, name, values):
        self.given[name] = values
        return True

    def get_missing_weights(self):
        return self.engine.missing

    def refit_cuda_engine(self):
        for name, (kind, address, count) in self.given.items():
            read = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * (count * kind.itemsize)).from_address(address))
            self.engine.values[name] = bytes(read)
        return self.engine.takes


@pytest.fixture
def trt():
    return SimpleNamespace(
        Refitter=ScriptedRefitter,
        DataType=SimpleNamespace(FLOAT=FLOAT, HALF=HALF),
        Weights=lambda kind, address, count: (kind, address, count),
    )


@pytest.fixture
def engine():
    known = {"conv.weight": SimpleNamespace(dtype=HALF, size=6), "conv.bias": SimpleNamespace(dtype=FLOAT, size=3)}
    return SimpleNamespace(refittable=True, weights=known, missing=[], takes=True, values={})


@pytest.fixture
def given(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(64)))
    return {"conv.weight": [str(path), 7, [2, 3], "float16"], "conv.bias": [str(path), 40, [3], "float32"]}


def test_tensorrt_is_given_each_weight_under_its_name(trt, engine, given):
    assert exchange_weights(trt, engine, None, given) == ""
    assert engine.values == {"conv.weight": bytes(range(7, 19)), "conv.bias": bytes(range(40, 52))}


def test_a_weight_that_would_stay_as_it_was_is_named(trt, engine, given):
    def refuses(changed, weights_given=given):
        return exchange_weights(trt, changed, None, weights_given)

    known = engine.weights
    folded = replace_attribute(engine, weights={"conv.bias": known["conv.bias"]})
    assert refuses(folded) == "1 weights have no name in the engine, for TensorRT folded them: conv.weight"
    wide = replace_attribute(engine, weights=known | {"conv.weight": SimpleNamespace(dtype=FLOAT, size=6)})
    assert refuses(wide) == "conv.weight is 6 of FLOAT in the engine, and 6 of HALF now"
    short = replace_attribute(engine, weights=known | {"conv.bias": SimpleNamespace(dtype=FLOAT, size=4)})
    assert refuses(short) == "conv.bias is 4 of FLOAT in the engine, and 3 of FLOAT now"
    assert refuses(replace_attribute(engine, missing=["shift"])) == "TensorRT needs 1 other weights too: shift"
    assert refuses(replace_attribute(engine, refittable=False)) == "TensorRT says that it is not refittable"
    assert refuses(replace_attribute(engine, takes=False)) == "TensorRT could not refit it"
    with pytest.raises(ValueError, match="was cut short"):
        refuses(engine, given | {"conv.bias": [given["conv.bias"][0], 60, [3], "float32"]})


def replace_attribute(namespace, **changes):
    return SimpleNamespace(**vars(namespace) | changes)
