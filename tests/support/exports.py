"""Models that shapecheck itself exported, once a run: each export takes ten seconds, so their tests are `full`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from artefacts import identify, make_once
from diffusers import ControlNetModel, UNet2DConditionModel
from narrowed_presets import narrowed
from small import TINY, fill_zero_convolutions
from torch import nn

from shapecheck import export, presets, read_contract
from shapecheck.onnx.records import Exported

LEAST = TINY | {"up_block_types": ("UpBlock2D",)}
"""A UNet of three slots with attention in its mid block alone: the least that the exporter can be given."""


def exported_once(model: nn.Module, **options: Any) -> Exported:
    """Return what `export` writes for a live model that was saved to a folder; `options` are those of `export`.

    The ONNX file lies in the model folder, `unet/` or `controlnet/` beside it. Who changes any of it changes a copy.
    """
    kind = "controlnet" if "ControlNet" in type(model).__name__ else "unet"

    def make(folder: Path) -> None:
        home = folder / "model"
        model.save_pretrained(home / kind)
        done = export(str(home / kind if kind == "controlnet" else home), home / f"{kind}.onnx", **options)
        record = {
            "weights": done.weights,
            "reason": done.reason,
            "dtype": done.dtype,
            "opset": done.opset,
            "naming": done.naming,
        }
        record["files"] = [str(file.relative_to(home)) for file in done.files]
        (folder / "exported.json").write_text(json.dumps(record), encoding="utf-8")

    folder = make_once({"exporter": "shapecheck", "options": options, **identify(model)}, make)
    record = json.loads((folder / "exported.json").read_text(encoding="utf-8"))
    home = folder / "model"
    files = tuple(home / file for file in record.pop("files"))
    return Exported(files[0], read_contract(files[0]), files=files, **record)


def reduced(preset: str) -> nn.Module:
    """Return a model of a preset's topology at a fortieth of its width, with random weights; nothing that it emits is zero."""
    torch.manual_seed(0)
    known = presets.load(preset)
    model_class = UNet2DConditionModel if known.kind == "unet" else ControlNetModel
    model = model_class.from_config(narrowed(json.loads(json.dumps(known.config)))).eval()
    if known.kind == "controlnet":
        fill_zero_convolutions(model)
    return model
