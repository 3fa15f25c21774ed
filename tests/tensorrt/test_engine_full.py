"""SDXL's own architecture at a fortieth of its width, in half precision, the whole way to an engine of TensorRT for RTX."""

from __future__ import annotations

import json

import engines
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from narrowed_presets import narrowed

from shapecheck import export, presets
from shapecheck.build.engine import build_engine
from shapecheck.contract.metadata import WEIGHTS

pytestmark = pytest.mark.full


def test_a_reduced_sdxl_in_half_precision(tmp_path):
    torch.manual_seed(0)
    config = narrowed(json.loads(json.dumps(presets.load("sdxl").config)))
    UNet2DConditionModel(**config).half().save_pretrained(tmp_path / "unet")
    done = export(tmp_path, tmp_path / "unet.onnx")
    assert (done.dtype, done.weights) == ("float16", "link")
    built = build_engine(done.path, tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX)
    profile = built.engine.request.profiles[0]
    assert [each.dtype for each in profile.inputs] == ["float16", "float32", *["float16"] * (len(profile.inputs) - 2)]
    assert {"text_embeds", "time_ids"} <= {each.name for each in profile.inputs}
    metadata = {each.key: each.value for each in onnx.load(done.path, load_external_data=False).metadata_props}
    assert built.engine.request.weights == built.engine.request.checkpoint == metadata[WEIGHTS]
    assert build_engine(done.path, tmp_path / "unet.plan", profiles=[engines.SIZES], options=engines.RTX).found
