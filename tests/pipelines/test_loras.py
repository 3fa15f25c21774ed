"""LoRAs in a whole pipeline: loaded, weighted, fused and exchanged, beside the pictures of the pipeline in PyTorch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import real_pipelines
from loras import write_lora

import shapecheck
from shapecheck.onnx import export as exporter
from shapecheck.onnx import rebind as rebinding

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]
pytestmark.append(pytest.mark.filterwarnings("ignore:Already found a `peft_config`"))  # peft's, of a second LoRA
ALLOWED = 1 / 255


@pytest.fixture
def pipe():
    parts = copy.deepcopy(real_pipelines.take_parts("shallow"))
    return real_pipelines.PIPELINES["controlnet"](parts)


@pytest.fixture
def made(monkeypatch):
    """What was made from then on, in order: `export` and `rebind`."""
    made = []
    for module, name in ((exporter, "export"), (rebinding, "rebind")):
        make = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, make=make, name=name, **more: (made.append(name), make(*given, **more))[1]
        )
    return made


def test_each_exchange_of_loras_is_drawn_without_tracing_again(pipe, tmp_path, made):
    files = [write_lora(pipe.unet, tmp_path, seed=seed) for seed in (1, 2)]
    for number, file in enumerate(files):
        pipe.load_lora_weights(file, adapter_name=f"lora{number}")
    changes = {
        "two, weighted": lambda: pipe.set_adapters(["lora0", "lora1"], [0.6, 1.4]),
        "another weight": lambda: pipe.set_adapters(["lora0", "lora1"], [0.6, 0.2]),
        "one of them": lambda: pipe.set_adapters("lora1"),
        "fused": lambda: pipe.fuse_lora(lora_scale=0.7),
        "unloaded": lambda: (pipe.unfuse_lora(), pipe.unload_lora_weights()),
    }
    pictures = []
    for change in changes.values():
        change()
        expected = real_pipelines.images(pipe)
        with shapecheck.accelerate(pipe, tmp_path / "files", "ort", controlnets=False, fallback="error"):
            found = real_pipelines.images(pipe)
        assert np.abs(found - expected).max() <= ALLOWED
        assert all(np.abs(found - other).max() > 2 * ALLOWED for other in pictures), "each change is seen"
        pictures.append(found)
    assert made == ["export", "rebind", "rebind", "rebind", "rebind"]
