"""Opening and running a file, and reading in what it computes: on a graph of two operators."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from shapecheck import ShapecheckError, presets
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.weight_comparison import find_narrower
from shapecheck.parity import runners
from shapecheck.parity.artefacts import ParityFile
from shapecheck.parity.divergence import in_onnx_runtime
from shapecheck.runtime.onnx_session import OnnxSession


def written(path, *nodes, weights=()):
    """Write a graph that takes and gives 2×3 numbers."""
    named = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("sample", "image")]
    graph = helper.make_graph(list(nodes), "small", named[:1], named[1:], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def cast(name: str, given: str, to: str, dtype: int):
    return helper.make_node("Cast", [given], [to], name=name, to=dtype)


@pytest.fixture
def healthy(tmp_path):
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    return written(tmp_path / "healthy.onnx", helper.make_node("Mul", ["sample", "weight"], ["image"]), weights=[weight])


def test_a_file_runs_and_a_call_that_it_refuses_is_told_in_its_words(healthy):
    with OnnxSession.open(healthy) as session:
        assert session.provider == "CPUExecutionProvider"
        assert session({"sample": torch.ones(2, 3)})["image"].tolist() == [[1, 2, 3], [1, 2, 3]]
        with pytest.raises(ShapecheckError, match=r"^ONNX Runtime cannot run this call: .*sample"):
            session({"sample": torch.ones(2, 4)})
        assert session({"sample": torch.ones(2, 3)})["image"].tolist() == [[1, 2, 3], [1, 2, 3]]  # and goes on


def test_a_file_that_onnx_runtime_cannot_load_is_told_in_its_words(tmp_path):
    path = written(tmp_path / "odd.onnx", helper.make_node("Odd", ["sample"], ["image"], domain="somewhere"))
    with pytest.raises(ShapecheckError, match=r"^ONNX Runtime cannot load .*odd\.onnx: .*somewhere"):
        OnnxSession.open(path)
    with pytest.raises(ShapecheckError, match=r"^ONNX Runtime cannot load the model: "):
        OnnxSession.open(b"no model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing falls back")
def test_a_session_that_fell_back_to_the_cpu_is_refused_unless_it_is_asked_for(healthy):
    with pytest.raises(ShapecheckError, match="ort-cuda was requested and ONNX Runtime fell back to CPUExecutionProvider"):
        OnnxSession.open(healthy, backend="ort-cuda")
    with OnnxSession.open(healthy, backend="ort-cuda", strict=False) as session:
        assert session.provider == "CPUExecutionProvider"


def test_the_image_and_the_values_inside_are_computed_in_float32_and_not_in_tf32(monkeypatch):
    asked = []
    monkeypatch.setattr(OnnxSession, "open", lambda model, **given: asked.append(given["options"]) or MagicMock())
    file = ParityFile(presets.contract("sd15"), {}, {}, Path("unet.onnx"))
    runners.open_session("ort-cuda", file, (), model=None)
    in_onnx_runtime(file.path, {}, "ort-cuda")(b"", {})
    assert asked == [{"use_tf32": "0"}, {"use_tf32": "0"}]


def test_what_computes_in_less_than_the_image_that_goes_in(tmp_path, healthy):
    assert find_narrower(OnnxFile(healthy), "float32") == ()
    lowered = cast("down", "sample", "low", TensorProto.FLOAT16), cast("up", "low", "image", TensorProto.FLOAT)
    weight = helper.make_tensor("weight", TensorProto.FLOAT16, [1], [1.0])
    path = written(tmp_path / "half.onnx", *lowered, weights=[weight])
    assert find_narrower(OnnxFile(path), "float32") == ("weight weight is float16", "cast to float16 at down")
    assert find_narrower(OnnxFile(path), "float16") == ()
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])
    nodes = (
        helper.make_node("QuantizeLinear", ["sample", "scale"], ["low"], name="q"),
        helper.make_node("DequantizeLinear", ["low", "scale"], ["image"], name="d"),
    )
    told = find_narrower(OnnxFile(written(tmp_path / "quantised.onnx", *nodes, weights=[scale])), "float32")
    assert [each.split(" ")[0] for each in told] == ["QuantizeLinear", "DequantizeLinear"]
