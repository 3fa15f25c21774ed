"""Products in fp8: graphs written here and files that we export, against PyTorch's own casts to float8."""

from __future__ import annotations

from pathlib import Path

import engines
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import small
import torch
from click.testing import CliRunner
from comparison import difference, given_to, inputs_for
from exports import LEAST
from onnx_files import check, exchange, planted
from torch import nn

from shapecheck import Calibration, Geometry, ShapecheckError, export, parity, probe, read_contract
from shapecheck.cli import main
from shapecheck.models.calibration_record import CalibratedModel, digest_model
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.fp8_graph import is_in_fp8, quantize_products
from shapecheck.onnx.weight_comparison import find_narrower
from shapecheck.runtime.onnx_session import OnnxSession
from shapecheck.tensorrt.build import build_engine
from shapecheck.tensorrt.profiles import Range

IN_FP8 = LEAST | {"block_out_channels": (16,), "cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 4}
DELICATE = ("conv_in", "conv_out", "time_emb", "conv_shortcut")


def rounded(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """What float8 holds of a tensor, by PyTorch's cast."""
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def write_products(path: Path) -> dict[str, torch.Tensor]:
    """Write a convolution, a turned product and a Gemm as our exporter does, and return their weights."""
    torch.manual_seed(0)
    weights = {"conv": torch.randn(16, 16, 3, 3), "linear": torch.randn(16, 16), "gemm": torch.randn(16, 16)}
    text = """
    <ir_version: 9, opset_import: ["" : 20]>
    products (float[n, 16, h, w] image, float[n, k, 16] tokens, float[n, 16] vector, float[16, 16, 3, 3] conv.weight,
              float[16, 16] linear.weight, float[16, 16] gemm.weight)
        => (float[n, 16, h, w] a, float[n, k, 16] b, float[n, 16] c)
    {
        a = Conv<pads = [1, 1, 1, 1]> (image, conv.weight)
        swapped = Transpose<perm = [0, 2, 1]> (tokens)
        back = Transpose<perm = [0, 2, 1]> (swapped)
        turned = Transpose<perm = [1, 0]> (linear.weight)
        b = MatMul (back, turned)
        c = Gemm<transB = 1> (vector, gemm.weight)
    }
    """
    model = ir.from_proto(onnx.parser.parse_model(text.replace(".weight", "_weight")))
    for value in model.graph.inputs[3:]:
        value.name = value.name.replace("_weight", ".weight")
    quantize_products(model, dict.fromkeys(weights, 2.0**-6), dict.fromkeys(weights, 2.0**-7))
    for value in list(model.graph.inputs[3:]):
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name.removesuffix(".weight")].numpy(), name=value.name)
        model.graph.register_initializer(value)
    ir.save(model, path)
    return weights


@pytest.fixture
def products(tmp_path):
    return tmp_path / "products.onnx", write_products(tmp_path / "products.onnx")


def test_onnx_runtime_multiplies_what_float8_holds(products):
    path, weights = products
    onnx.checker.check_model(onnx.load(path), full_check=True)
    given = {"image": torch.randn(2, 16, 5, 7) * 3, "tokens": torch.randn(2, 9, 16), "vector": torch.randn(2, 16)}
    given["image"][0, 0, 0, 0] = 1e4  # more than any code: it becomes the largest one
    found = OnnxSession.open(path)(given)  # which would move the roundings across the Transpose
    image, tokens, vector = (rounded(value, 2.0**-6) for value in given.values())
    weight = {name: rounded(value, 2.0**-7) for name, value in weights.items()}
    expected = {
        "a": nn.functional.conv2d(image, weight["conv"], padding=1),
        "b": tokens @ weight["linear"].T,
        "c": vector @ weight["gemm"].T,
    }
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-4), name
    assert not torch.allclose(found["b"], given["tokens"] @ weights["linear"].T, atol=1e-2)


def test_a_value_that_goes_into_several_products_is_rounded_once():
    model = ir.from_proto(
        onnx.parser.parse_model(
            """
            <ir_version: 9, opset_import: ["" : 20]>
            shared (float16[n, 16] x, float16[16, 16] one_weight, float16[16, 16] two_weight)
                => (float16[n, 16] a, float16[n, 16] b)
            {
                a = Gemm<transB = 1> (x, one_weight)
                b = Gemm<transB = 1> (x, two_weight)
            }
            """
        )
    )
    for value in model.graph.inputs[1:]:
        value.name = value.name.replace("_weight", ".weight")
    quantize_products(model, {"one": 0.25, "two": 0.5}, {"one": 0.125, "two": 0.125})
    nodes = {node.outputs[0].name: node for node in model.graph if node.op_type == "QuantizeLinear"}
    assert list(nodes) == ["x.fp8", "one.weight.fp8", "two.weight.fp8"]
    scale = nodes["x.fp8"].inputs[1].const_value
    assert (scale.dtype, float(scale.numpy())) == (ir.DataType.FLOAT16, 0.5)  # in the graph's type, wide enough for both
    with pytest.raises(ValueError, match="no product of three"):
        quantize_products(model, {"three": 0.5}, {})


def test_only_rounding_to_float8_that_was_requested_is_no_narrower_arithmetic(products, tmp_path):
    path, _ = products
    assert is_in_fp8(OnnxFile(path))
    assert len(find_narrower(OnnxFile(path), "float32")) == 12
    assert find_narrower(OnnxFile(path), "float32", with_fp8=True) == ()
    model = onnx.load(path)
    next(tensor for tensor in model.graph.initializer if tensor.name.endswith("zero")).data_type = onnx.TensorProto.INT8
    onnx.save(model, tmp_path / "int8.onnx")
    assert not is_in_fp8(OnnxFile(tmp_path / "int8.onnx"))
    assert len(find_narrower(OnnxFile(tmp_path / "int8.onnx"), "float32", with_fp8=True)) == 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model folder, its calibration, its file in fp8 that points into the checkpoint, and the live model."""
    folder = tmp_path_factory.mktemp("fp8")
    unet = small.unet(**IN_FP8)
    unet.save_pretrained(folder / "unet")
    layers = tuple((name, 3.0) for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    model = CalibratedModel("unet", "UNet2DConditionModel", digest_model(probe(unet)), layers)
    (folder / "calibration.json").write_text(Calibration((model,), 1, 1, ()).to_json(), encoding="utf-8")
    done = export(folder / "unet", folder / "unet.onnx", fp8=folder / "calibration.json")
    return folder, done, unet


def simulate(unet: nn.Module, magnitude: float) -> None:
    """Make a UNet compute what its file should, by PyTorch's cast."""
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(part in name for part in DELICATE):
            largest = float(layer.weight.detach().abs().max())
            layer.weight.data = rounded(layer.weight.detach(), 2.0 ** np.ceil(np.log2(largest / 448)))
            scale = 2.0 ** np.ceil(np.log2(magnitude / 448))
            layer.register_forward_pre_hook(lambda _, inputs, scale=scale: (rounded(inputs[0], scale), *inputs[1:]))


@pytest.mark.full
def test_an_exported_file_computes_its_layers_in_float8(exported):
    folder, done, unet = exported
    assert (done.weights, done.opset) == ("link", 20)
    assert done.files == (folder / "unet.onnx", folder / "unet" / "diffusion_pytorch_model.safetensors")
    in_fp8 = [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(part in name for part in DELICATE)
    ]
    assert done.fp8 == len(in_fp8) >= 12
    checked = check(done.path)
    assert not checked.mismatches
    assert not checked.unchecked
    other = small.unet(**IN_FP8)
    simulate(other, 3.0)
    for geometry in (Geometry(2, 9, 14, 7), Geometry(1, 16, 24, 5)):
        given = inputs_for(done.contract, geometry)
        found = OnnxSession.open(done.path)(given)["out_sample"].numpy()
        call = given_to(done.contract, given)
        call["down_block_additional_residuals"] = [given[slot.name] for slot in done.contract.slots[:-1]]
        call["mid_block_additional_residual"] = given[done.contract.slots[-1].name]
        with torch.no_grad():
            expected, exact = (module(**call).sample.numpy() for module in (other, unet))
        # a value beside the middle of two codes may fall either way
        assert difference(found, expected) <= 0.2 * difference(exact, expected)
        assert difference(exact, expected) > 1e-3


@pytest.mark.full
def test_parity_judges_it_by_its_own_rule_and_only_if_asked(exported):
    folder, done, _ = exported
    plain = parity(folder / "unet", onnx=done.path, sizes=("112x72:112x72:112x72",), batch=("2",), tokens="7")
    assert any(result.check.kind == "precision" and "QuantizeLinear" in result.reason for result in plain.sides[0].failed)
    calibration = folder / "calibration.json"
    judged = parity(folder / "unet", onnx=done.path, fp8=calibration, sizes=("112x72:112x72:112x72",), batch=("2",), tokens="7")
    assert judged.passes, str(judged)
    assert judged.least_psnr == 30
    cases = [result for result in judged.sides[0].results if result.check.kind == "case"]
    verdicts = [result.verdict for result in cases if "varied" not in result.check.where]
    assert all(verdict.psnr >= 30 and verdict.own > 0 for verdict in verdicts)
    options = ["--backends", "torch", "--fp8", str(calibration), "--sizes", "112x72:112x72:112x72", "--batch", "2"]
    output = CliRunner().invoke(main, ["parity", str(folder / "unet"), *options]).output
    assert "with the same layers in fp8, and every output has at least 30 dB PSNR" in " ".join(output.split())


@pytest.mark.full
def test_exchanged_slots_of_a_file_in_fp8_are_named(exported):
    folder, done, _ = exported
    names = ("down_block_residual_00", "down_block_residual_01")
    wrong = planted(done.path, folder / "exchanged.onnx", exchange(*names))
    sizes = {"sizes": ("112x72:112x72:112x72",), "batch": ("2",), "tokens": "7"}
    broken = parity(folder / "unet", onnx=wrong, fp8=folder / "calibration.json", **sizes)
    failed = {result.check.where: result.reason for result in broken.sides[0].failed if result.check.kind == "slot"}
    assert list(failed) == list(names)
    for name, other in (names, names[::-1]):
        assert f"{name} acts where {other} belongs" in failed[name]


@pytest.mark.full
def test_tensorrt_parses_it_and_builds(exported, tmp_path):
    folder, _, _ = exported
    done = export(folder / "unet", tmp_path / "half.onnx", dtype="float16", fp8=folder / "calibration.json")
    assert done.fp8 == exported[1].fp8
    sizes = Range(Geometry(1, 8, 9), Geometry(2, 17, 25), Geometry(3, 33, 41))
    built = build_engine(done.path, tmp_path / "unet.plan", profiles=sizes, options=engines.RTX)
    assert built.path.stat().st_size > 0


@pytest.mark.gpu
def test_tensorrt_computes_what_pytorch_rounds(exported, tmp_path, shapecheck_require):
    shapecheck_require("trt")
    folder, _, _ = exported
    calibration = folder / "calibration.json"
    done = export(folder / "unet", tmp_path / "half.onnx", dtype="float16", fp8=calibration)
    size = Range(*[Geometry(2, 64, 64, 77)] * 3)
    built = build_engine(done.path, tmp_path / "unet.plan", profiles=size)
    judged = parity(folder / "unet", engine=built.path, onnx=done.path, backends=("trt", "ort-cuda"), fp8=calibration)
    print(*(f"{side.backend} {result.check}: {result.verdict}" for side in judged.sides for result in side.results), sep="\n")
    assert judged.passes, str(judged)


@pytest.mark.full
def test_what_cannot_be_in_fp8_is_said(exported, tmp_path):
    folder, done, unet = exported
    calibration = folder / "calibration.json"
    with pytest.raises(ShapecheckError, match="opset 18 with float32 and fp8: expected 19 to 23"):
        export(folder / "unet", tmp_path / "unet.onnx", fp8=calibration, opset=18)
    with pytest.raises(ShapecheckError, match="the calibration is of other models"):
        export("sd15", tmp_path / "unet.onnx", fp8=calibration, weights="none", dtype="float32")
    with pytest.raises(ShapecheckError, match=r"fp8 needs the weights of .*no values"):
        export(unet.to("meta"), tmp_path / "unet.onnx", fp8=calibration, weights="none")
    assert not list(tmp_path.iterdir())
    model = onnx.load(done.path, load_external_data=False)
    for node in [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        node.op_type, node.input[1:] = "Identity", []
    onnx.save(model, folder / "plain.onnx")
    with pytest.raises(ShapecheckError, match="computes nothing in fp8"):
        parity(folder / "unet", onnx=folder / "plain.onnx", fp8=calibration)
    compiled = parity(folder / "unet", backends=("torch-compile",), fp8=calibration)
    assert "torch-compile computes nothing in fp8" in str(compiled)
    assert read_contract(done.path) == done.contract
