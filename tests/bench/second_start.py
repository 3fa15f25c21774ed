"""Where the second start of `accelerate` spends its seconds: `python tests/bench/second_start.py FOLDER [--preset sd15]`.

Random weights that are the same in every process, in half precision on the GPU. The first run in a FOLDER fills it, which
takes minutes; every later one, in its new process, is a second start. Printed: seconds from the call to each step, to the
first frame and the next, and what a frame takes. `--profile` prints the 60 functions that took the longest, callees included.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate_gpu import make_pipeline

import shapecheck
from shapecheck import Geometry
from shapecheck.pipelines import measure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="sd15")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--benchmark-limit", type=int, default=10, help="plans that cuDNN tries for each convolution")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="          %(levelname)s %(message)s")
    torch.backends.cudnn.benchmark_limit = given.benchmark_limit
    pipe = make_pipeline(given.preset, 1)
    torch.cuda.synchronize()
    profiler, steps, began = cProfile.Profile(), set[str](), time.perf_counter()

    def tell(step: str, *_: int) -> None:
        if step not in steps:
            steps.add(step)
            print(f"{time.perf_counter() - began:7.2f} s  {step}", flush=True)

    if given.profile:
        profiler.enable()
    options = {"sizes": [given.size], "batch": [f"1:{given.batch}:{given.batch}"]}
    done = shapecheck.accelerate(pipe, given.folder, given.backend, **options, progress=tell)
    tell("accelerate has returned")
    width, height = (int(side) for side in given.size.split("x"))
    models: Any = done.unet, tuple(part.module for part in done.controlnets)
    geometry = Geometry.from_px(width, height, batch=given.batch)
    contracts = models[0].contract, [net.contract for net in models[1]]  # there is none where PyTorch won
    inputs = measure.FrameInputs(*contracts, geometry, torch.device("cuda"), torch.float16, drawn=False)
    with torch.no_grad():
        for frame in ("the first frame", "another frame"):
            inputs.play_frame(models)
            torch.cuda.synchronize()
            tell(frame)
        profiler.disable()
        times = []
        for _ in range(200):
            clock = time.perf_counter()
            inputs.play_frame(models)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - clock) * 1000)
        print(f"{statistics.median(times):.2f} ms a frame", flush=True)
    print(done, flush=True)
    if given.profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)
    done()


if __name__ == "__main__":
    main()
