"""Every preset and topology at reduced width and depth, exported and compared with PyTorch at an odd size."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import small
import torch
from comparison import difference, every_output, inputs_for, session
from diffusers import ControlNetModel, UNet2DConditionModel
from narrowed_presets import narrowed
from small import SHALLOW

from shapecheck import Geometry, export, presets

XL = SHALLOW | small.TEXT_TIME | {"transformer_layers_per_block": (1, 2), "use_linear_projection": True}


_SHAPING = (
    "use_linear_projection", "time_cond_proj_dim", "addition_embed_type", "transformer_layers_per_block", "num_class_embeds",
)  # fmt: skip
CONTROLNETS = ("controlnet-sd15", "controlnet-sd21", "controlnet-sdxl-full", "controlnet-sdxl-small")
"""The one between those for SDXL differs from both in depth alone."""


def distinct_presets():
    """One UNet preset of each topology: those that differ in nothing but the width of an input are one."""
    topologies = {}
    for name, contract in sorted(presets.contracts().items(), key=lambda pair: len(pair[0])):
        slots = tuple((slot.skip, slot.producer) for slot in contract.slots)
        topologies.setdefault((slots, *(contract.config.get(key) or None for key in _SHAPING)), name)
    return sorted((*topologies.values(), *CONTROLNETS))


def odd_size(contract):
    """Odd, or odd multiples of what the model's sizes must be multiples of."""
    return Geometry(2, 17, 25, 5) if contract.divisor == 1 else Geometry(2, 3 * contract.divisor, 5 * contract.divisor, 5)


def agrees_with_torch(model, done):
    """Whether float32 is within 2e-6 of the largest value, and float16 within twice PyTorch's own error."""
    half = done.dtype == "float16"
    given = inputs_for(done.contract, odd_size(done.contract), dtype=torch.float16 if half else torch.float32)
    if done.contract.config.get("num_class_embeds"):
        given["class_labels"] = torch.tensor([7, 940])
    found = session(done.path).run(None, {name: value.numpy() for name, value in given.items()})
    exact = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    expected = every_output(model, done.contract, exact)
    allowed = [2e-6] * len(expected)
    if half:
        own = every_output(copy.deepcopy(model).half(), done.contract, given)
        allowed = [2 * difference(*pair) for pair in zip(own, expected, strict=True)]
    errors = [difference(each.astype(np.float32), wanted) for each, wanted in zip(found, expected, strict=True)]
    assert np.isfinite(allowed).all()
    return all(error <= most for error, most in zip(errors, allowed, strict=True))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in distinct_presets()),
        *((name, "float16") for name in ("sdxl", "controlnet-sdxl-small")),
    ],
)
def test_every_preset_is_right_at_an_odd_size(tmp_path, name, dtype):
    torch.manual_seed(0)
    preset = presets.load(name)
    model_class = UNet2DConditionModel if preset.kind == "unet" else ControlNetModel
    model = model_class.from_config(narrowed(preset.config)).eval()
    if preset.kind == "controlnet":
        small.fill_zero_convolutions(model)
    model.save_pretrained(tmp_path / "model")
    done = export(str(tmp_path / "model"), tmp_path / "model.onnx", dtype=dtype)
    assert done.weights == ("link" if dtype == "float32" else "copy")
    assert agrees_with_torch(model, done)


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "opset"),
    [
        *((XL, opset) for opset in (18, 21, 23)),
        (SHALLOW | {"mid_block_type": None}, 20),
        (SHALLOW | {"downsample_padding": 0}, 20),
        (SHALLOW | {"class_embed_type": "timestep"}, 20),
    ],
)
def test_other_opsets_and_topologies_are_right_at_an_odd_size(tmp_path, changes, opset):
    unet = small.unet(**changes)
    unet.save_pretrained(tmp_path / "unet")
    done = export(str(tmp_path), tmp_path / "unet.onnx", opset=opset)
    assert {each.version for each in onnx.load(done.path, load_external_data=False).opset_import if not each.domain} == {opset}
    assert agrees_with_torch(unet, done)
