"""A calibration as a record, the rule of what is in fp8, and float8 in PyTorch: against codes that are counted out here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from shapecheck import Calibration, ShapecheckError, presets
from shapecheck.models.calibration_record import CalibratedModel, choose_scale, digest_model, read_calibration
from shapecheck.models.fp8_simulation import measure_magnitude, quantize, simulate_fp8

MODEL = CalibratedModel("unet", "UNet2DConditionModel", "sha256:1", (("down_blocks.0.resnets.0.conv1", 3.5),))
CALIBRATION = Calibration((MODEL,), 8, 160, (("torch", "2.11"),))
CODES = sorted(
    sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))
    for sign in (1, -1)
    for exponent in range(16)
    for mantissa in range(8)
    if (exponent, mantissa) != (15, 7)  # NaN
)
"""Every number of float8 e4m3fn: four bits of exponent, three of mantissa."""


def test_a_calibration_comes_back_as_it_was(tmp_path):
    assert Calibration.from_json(CALIBRATION.to_json()) == CALIBRATION
    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATION.to_json(), encoding="utf-8")
    assert read_calibration(path) == CALIBRATION == read_calibration(CALIBRATION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapecheck_calibration": 2}, "schema 2"),
        ({"prompts": 0}, "prompts: expected a whole number of at least 1"),
        ({"models": []}, "models: none"),
        ({"models": [{"role": "vae"}]}, "expected one of unet, controlnet"),
        ({"layers": {"conv": 0.0}}, "conv: the magnitude is not a positive number"),
        ({"layers": {"conv": float("nan")}}, "conv: the magnitude is not a positive number"),
        ({"layers": {"conv": float("inf")}}, "conv: the magnitude is not a positive number"),
        ({"layers": {"conv": "large"}}, "expected a number"),
        ({"layers": {"a\nb": 1.0}}, "cannot be printed"),
        ({"twice": True}, "one is there twice"),
    ],
)
def test_what_no_calibration_is_is_refused(change, message, tmp_path):
    record = json.loads(CALIBRATION.to_json())
    if "layers" in change:
        record["models"][0] |= change
    elif "twice" in change:
        record["models"] *= 2
    else:
        record |= change
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ShapecheckError, match=f"calibration.json: .*{message}"):
        read_calibration(path)


def test_one_calibration_is_for_every_form_of_a_model_and_for_no_other():
    contract = presets.contract("sd15")
    known = replace(MODEL, contract=digest_model(contract))
    calibration = replace(CALIBRATION, models=(MODEL, known))
    half = contract.with_dtypes({base.name: "float16" for base in contract.inputs})
    for form in (contract, half, replace(contract, slots=())):
        assert calibration.find_model(form) is known
    with pytest.raises(ShapecheckError, match=r"other models than this UNet2DConditionModel \(sha256:.*calibrate the"):
        calibration.find_model(presets.contract("sdxl"))


def test_layers_that_are_delicate_or_narrow_stay_as_they_are():
    wide, kernel = (320, 320), (320, 320, 3, 3)
    shapes = {
        "conv_in": (320, 4, 3, 3),
        "conv_out": kernel,
        "time_embedding.linear_1": wide,
        "add_embedding.linear_2": wide,
        "down_blocks.0.resnets.0.conv1": kernel,
        "down_blocks.0.resnets.0.time_emb_proj": wide,
        "up_blocks.1.resnets.0.conv_shortcut": (320, 640, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": wide,
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (2560, 320),
        "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
        "down_blocks.0.downsamplers.0.conv": kernel,
        "controlnet_cond_embedding.blocks.3": (96, 32, 3, 3),
        "controlnet_down_blocks.2": (320, 320, 1, 1),
        "controlnet_mid_block": (1280, 1280, 1, 1),
        "narrow": (320, 24),
        "depthwise": (320, 1, 3, 3),
        "large": (320, 320, 7, 7),
        "never_called": wide,
    }
    layers = tuple((name, 3.5) for name in shapes if name != "never_called")
    assert replace(MODEL, layers=layers).choose_scales(shapes) == dict.fromkeys(
        [
            "down_blocks.0.resnets.0.conv1",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "down_blocks.0.attentions.0.proj_in",
            "down_blocks.0.downsamplers.0.conv",
        ],
        2.0**-7,  # 3.5 of 448
    )


@pytest.mark.parametrize(
    ("magnitude", "scale"),
    [
        (448, 1),
        (449, 2),
        (224, 0.5),
        (225, 1),
        (65504, 256),
        (1.0, 2.0**-8),
        (1e-9, 2.0**-14),
        (0.0, 2.0**-14),
        (1e30, 2.0**15),
    ],
)
def test_a_scale_is_the_least_power_of_two_that_float16_can_hold(magnitude, scale):
    assert choose_scale(magnitude) == scale


def test_values_become_the_nearest_code_and_the_largest_never_nan():
    values = torch.cat([torch.linspace(-500, 500, 999), torch.linspace(-0.03, 0.03, 99), torch.tensor([1e9, -1e9, 0.0])])
    codes = torch.tensor(CODES)
    found = quantize(values * 0.25, 0.25).float()
    nearest = (values[:, None] - codes).abs().amin(1)
    assert torch.isin(found, codes).all()
    assert ((values - found).abs() <= nearest).all()
    assert found.abs().max() == 448


def test_the_largest_magnitude_of_tensors_is_found_and_a_nan_is_not_lost():
    tensors = [torch.tensor([1.0, -7.5]), torch.empty(0), torch.tensor([[3.0]], dtype=torch.float16)]
    assert measure_magnitude(tensors) == 7.5
    assert measure_magnitude([]) == 0
    assert not measure_magnitude([*tensors, torch.tensor([float("nan")])]) < float("inf")


def test_a_simulated_layer_multiplies_codes():
    torch.manual_seed(0)
    module = nn.ModuleDict({"wide": nn.Linear(32, 16), "conv_in": nn.Linear(32, 16)})
    before = {name: layer.weight.detach().clone() for name, layer in module.items()}
    values = torch.randn(5, 32) * 3
    largest = float(values.abs().max())
    simulate_fp8(module, replace(MODEL, layers=(("wide", largest), ("conv_in", largest))))
    codes = torch.tensor(CODES)

    def round_to_codes(tensor, scale):
        return codes[(tensor[..., None] / scale - codes).abs().argmin(-1)] * scale

    weight = round_to_codes(before["wide"], choose_scale(float(before["wide"].abs().max())))
    expected = round_to_codes(values, choose_scale(largest)) @ weight.T + module["wide"].bias
    assert torch.allclose(module["wide"](values), expected, atol=1e-6)
    assert not torch.allclose(module["wide"](values), values @ before["wide"].T + module["wide"].bias, atol=1e-3)
    assert torch.equal(module["conv_in"].weight, before["conv_in"])
