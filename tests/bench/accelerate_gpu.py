"""`accelerate` at its real size on a GPU: `python tests/bench/accelerate_gpu.py FOLDER [--preset sd15] [--budget 120]`.

Random weights, made on the GPU. Printed as it goes: what is logged, seconds to the first frame, what a thousand frames take,
how far they are from PyTorch's, memory, and the seconds of the second start. Run it twice for a start in a new process.
`--wait` waits for engines in the background, at most as many seconds, and starts a third time.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

import shapecheck
from shapecheck import Geometry, presets
from shapecheck.files import make_folder
from shapecheck.pipelines import measure
from shapecheck.pipelines.candidates import CandidateMaker

BEGAN = time.perf_counter()


def tell(text: str) -> None:
    print(f"{time.perf_counter() - BEGAN:7.1f} s  {text}", flush=True)


def make_pipeline(preset: str, controlnets: int) -> SimpleNamespace:
    """Return what holds a UNet and ControlNets, in half precision on the GPU; no ControlNet emits zeros."""
    torch.manual_seed(0)
    config = {key: value for key, value in presets.load(preset).config.items() if not key.startswith("_name")}
    with torch.device("cuda"):
        unet = UNet2DConditionModel.from_config(config).half().eval().requires_grad_(False)
        nets = []
        for _ in range(controlnets):
            net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
            for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                torch.nn.init.normal_(convolution.weight, std=0.02)
            nets.append(net.half().eval().requires_grad_(False))
    return SimpleNamespace(unet=unet, controlnet=nets[0] if len(nets) == 1 else SimpleNamespace(nets=nets) if nets else None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--preset", default="sd15")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--controlnets", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--wait", type=float, default=0.0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="          %(levelname)s %(message)s")
    pipe = make_pipeline(given.preset, given.controlnets)
    tell("models made")
    nets = tuple(getattr(pipe.controlnet, "nets", [pipe.controlnet] if pipe.controlnet is not None else []))
    device, (width, height) = torch.device("cuda"), (int(side) for side in given.size.split("x"))
    maker = CandidateMaker(make_folder(Path(given.folder)), (), {}, lambda *_: None, contracts={}, strict=False)
    inputs = measure.make_inputs(maker, pipe.unet, nets, Geometry.from_px(width, height, batch=given.batch))
    reference = measure.compute_reference((pipe.unet, nets), inputs)
    tell(f"reference in {reference.precision}")
    (eager,) = measure.time_in_turns({"torch": (pipe.unet, nets)}, inputs, device).values()
    tell(f"eager: {eager:.2f} ms a frame")

    options = {"sizes": [given.size], "batch": [f"1:{given.batch}:{given.batch}"], "budget": given.budget}
    for start in ("first", "second", "third")[: 3 if given.wait else 2]:
        began = time.perf_counter()
        done = shapecheck.accelerate(pipe, given.folder, given.backend, **options, progress=lambda *_: None)
        models = done.unet, tuple(part.module for part in done.controlnets)
        with torch.no_grad():
            inputs.play_frame(models)
            torch.cuda.synchronize()
            tell(f"{start} start: {time.perf_counter() - began:.1f} s to the first frame; pending: {done.pending}")
            print(done, flush=True)
            tell("; ".join(map(str, measure.check_outputs(inputs.compute_outputs(models), reference))))
            before, times = torch.cuda.memory_allocated(), []
            for _ in range(given.frames):
                clock = time.perf_counter()
                inputs.play_frame(models)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - clock) * 1000)
        median, grown = statistics.median(times), torch.cuda.memory_allocated() - before
        tell(f"{median:.2f} ms a frame, {median / eager:.2f} of eager; memory grew {grown} bytes")
        deadline = time.perf_counter() + given.wait
        while done.pending and time.perf_counter() < deadline:
            time.sleep(1)
        done()
        tell(f"undone; pending: {done.pending}; PyTorch is back on {next(pipe.unet.parameters()).device}")


if __name__ == "__main__":
    main()
