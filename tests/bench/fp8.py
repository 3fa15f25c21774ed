"""fp8 at its real size on a GPU: calibrated, exported, built by TensorRT beside float16, timed and held to PyTorch.

Run a part of it: python tests/bench/fp8.py FOLDER [--model sdxl] [--net controlnet] [--steps make,calibrate,export,build,time]
[--only fp8] [--seconds 540]. Files stay in FOLDER, so that steps may be run one by one; what is there already is not made
again. Everything is printed as it happens, with the seconds since the start.

Weights are random, and so is the text: what is measured is time, and whether TensorRT computes what the graph says. An engine
whose layers really are in fp8 is little more than half as large. `time` needs both engines, and shows PSNR beside PyTorch in
float32 of the engines, of PyTorch in float16, and of PyTorch with the same layers rounded to fp8. With `parity` the command is
run too; `--backends ort` in place of an engine tries the script where there is no GPU, with `--tiny`.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from engine_parity import DEVICE, PROFILES, START, call, draw, make, run_engine, run_torch, tell, time_calls
from torch import Tensor, nn

import shapecheck
from shapecheck import Calibration, EngineSession, Geometry
from shapecheck.models.fp8_simulation import simulate_fp8
from shapecheck.pipelines.tiny_pipeline import build_tiny_pipeline

STEPS = ("make", "calibrate", "export", "build", "time")
PRECISIONS = ("float16", "fp8")


class Pipeline(SimpleNamespace):
    """Calls a UNet and a ControlNet as a pipeline does, with a random text for a prompt."""

    def __call__(self, prompt: str, *, num_inference_steps: int, generator: torch.Generator, **_: object) -> None:
        unet, net = self.unet, self.controlnet
        config, device, dtype = unet.config, unet.device, unet.dtype

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        latent, text = noise(2, 4, self.side, self.side), noise(2, 77, config.cross_attention_dim)
        image = torch.rand((2, 3, 8 * self.side, 8 * self.side), generator=generator).to(device, dtype)
        added = None
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": noise(2, pooled), "time_ids": torch.full((2, 6), 1024.0, device=device, dtype=dtype)}
        with torch.no_grad():
            for step in range(num_inference_steps):
                arguments = (latent, 981 - step * 960 // num_inference_steps, text)
                downs, mid = net(*arguments, image, added_cond_kwargs=added, return_dict=False)
                residuals = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
                latent = unet(*arguments, added_cond_kwargs=added, **residuals).sample
                latent = latent / latent.float().std().to(dtype)


def load(folder: Path, net: str) -> nn.Module:
    model = diffusers.UNet2DConditionModel if net == "unet" else diffusers.ControlNetModel
    return model.from_pretrained(folder / net, torch_dtype=torch.float16).to(DEVICE).eval()


def calibrate(folder: Path, side: int, steps: int) -> None:
    pipe = Pipeline(unet=load(folder, "unet"), controlnet=load(folder, "controlnet"), side=side)
    calibration = shapecheck.calibrate(pipe, [f"prompt {number}" for number in range(4)], steps=steps)
    (folder / "calibration.json").write_text(calibration.to_json(), encoding="utf-8")
    for model in calibration.models:
        largest = max(model.layers, key=lambda layer: layer[1])
        tell(f"calibrated {model.name}: {len(model.layers)} layers, the largest magnitude {largest[1]:.4g} in {largest[0]}")


def make_tiny(folder: Path) -> None:
    """Write the demo's small models, calibrated as the demo draws."""
    pipe = build_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.save_pretrained(folder / "unet")
    pipe.controlnet.save_pretrained(folder / "controlnet")
    calibration = shapecheck.calibrate(pipe, ["a cat", "a dog"], steps=3, image=torch.rand(1, 3, 64, 96))
    (folder / "calibration.json").write_text(calibration.to_json(), encoding="utf-8")


def compare(folder: Path, net: str, geometry: Geometry, precisions: list[str]) -> None:
    """Print milliseconds, bytes and PSNR of the engines, and PSNR of PyTorch."""
    plans = {name: folder / f"{net}-{name}.plan" for name in precisions}
    found: dict[str, list[Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    contract: Any = None
    for name, plan in plans.items():
        with EngineSession.open(plan, graphs=True, verify=False) as session:
            contract = session.contract
            inputs = inputs or draw(contract, geometry)
            found[f"engine {name}"] = run_engine(session)(inputs)
            milliseconds = time_calls(partial(session, inputs))
            tell(f"engine {name}: {milliseconds:.2f} ms a call with CUDA graphs, {plan.stat().st_size / 1e9:.2f} GB")
    module = load(folder, net)
    found["PyTorch float16"] = run_torch(module, contract)(inputs)
    expected = run_torch(module.float(), contract)(inputs)
    module.half()
    calibration = Calibration.from_json((folder / "calibration.json").read_text(encoding="utf-8"))
    simulate_fp8(module, calibration.find_model(contract))
    found["PyTorch fp8"] = run_torch(module, contract)(inputs)
    for name, outputs in found.items():
        worst = min(measure_psnr(one, other) for one, other in zip(outputs, expected, strict=True))
        tell(f"{name:16} {worst:6.1f} dB PSNR beside float32, of its worst output")


def measure_psnr(found: Tensor, expected: Tensor) -> float:
    rms = float((found.double() - expected.double()).square().mean().sqrt())
    return 20 * math.log10(float(expected.double().abs().max()) / rms)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--net", choices=("unet", "controlnet"), default="unet")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--only", choices=PRECISIONS)
    parser.add_argument("--backends", default="trt")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=540.0)
    given = parser.parse_args()
    folder, net, steps, end = given.folder, given.net, given.steps.split(","), START + given.seconds
    folder.mkdir(parents=True, exist_ok=True)
    side = 64 if given.model == "sd15" else 128
    sizes = ("--sizes", "136x72", "--batch", "2") if given.tiny else PROFILES[given.model, "static"]
    geometry = Geometry(2 if given.model == "sd15" else 1, side, side)
    precisions = [given.only] if given.only else list(PRECISIONS)
    if "make" in steps:
        make_tiny(folder) if given.tiny else make(folder, given.model)
        tell("models made")
    if "calibrate" in steps and not (folder / "calibration.json").is_file():
        calibrate(folder, side, 8)
    fp8 = ("--fp8", folder / "calibration.json")
    for name in precisions:
        file, plan, extra = folder / f"{net}-{name}.onnx", folder / f"{net}-{name}.plan", fp8 if name == "fp8" else ()
        if "export" in steps and not file.is_file():
            call(end, "export", folder / net, "-o", file, "--dtype", "float16", *extra)
        if "build" in steps and not plan.is_file():
            call(end, "build", file, "-o", plan, *sizes)
        if "parity" in steps:
            artefacts = ("--onnx", file) if given.backends == "ort" else ("--engine", plan, "--onnx", file)
            call(
                end, "parity", folder / net, *artefacts, "--backends", given.backends, *sizes, "--reference", "float32", *extra
            )
    if "time" in steps:
        compare(folder, net, geometry, precisions)
    tell(f"done, {end - time.perf_counter():.0f} s left")


if __name__ == "__main__":
    main()
