"""Where the time of a parity run goes: `python tests/bench/parity_speed.py MODEL [BACKEND=FILE ...] [--sizes 512x512]`.

`ort=unet.onnx`, `trt=unet.plan`, `onnx=unet.onnx` beside an engine; without a file PyTorch itself. Each phase is printed when
it is over, then the report and the sums.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict

BEGAN = time.perf_counter()


class Clock:
    """A progress callback that adds up the seconds of each phase: the words of a step before the first comma or colon."""

    def __init__(self) -> None:
        self.seconds, self.steps = defaultdict(float), defaultdict(int)
        self._phase, self._began = "importing", BEGAN

    def __call__(self, step: str, _done: int = 0, _total: int = 0, /) -> None:
        now, phase = time.perf_counter(), re.split(r"[,:]", step)[0]
        self.seconds[self._phase] += now - self._began
        self.steps[self._phase] += 1
        if phase != self._phase:
            print(f"{now - BEGAN:7.2f} s  {self.seconds[self._phase]:.2f} s of {self._phase}; next: {step}", flush=True)
        self._phase, self._began = phase, now


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--sizes", default="512x512")
    parser.add_argument("--batch", default="2")
    parser.add_argument("--reference", default="auto")
    given = parser.parse_args()
    files = dict(file.split("=", 1) for file in given.files)
    engine = next((files[name] for name in ("trt", "rtx") if name in files), None)
    onnx = next((file for name, file in files.items() if name.startswith(("ort", "onnx"))), None)
    backends = tuple(name for name in files if name != "onnx") or ("torch",)
    clock = Clock()

    import torch

    from shapecheck.parity.cases import InputGenerator
    from shapecheck.parity.report import render_text
    from shapecheck.parity.request import ParityRequest, create_run

    drawing, draw = [0.0], InputGenerator.__call__

    def draw_timed(self, case, **options):
        began = time.perf_counter()
        values = draw(self, case, **options)
        drawing[0] += time.perf_counter() - began
        return values

    InputGenerator.__call__ = draw_timed
    sizes = {"sizes": (given.sizes,), "batch": (given.batch,)} if given.sizes else {}
    request = ParityRequest(given.model, onnx, engine, backends, reference=given.reference, **sizes)
    parity = create_run(request, clock).report()
    clock("")
    whole = time.perf_counter() - BEGAN
    print(render_text(parity))
    for phase, seconds in clock.seconds.items():
        print(f"{seconds:8.2f} s in {clock.steps[phase]:3} steps: {phase}")
    print(f"{drawing[0]:8.2f} s of it: drawing inputs")
    if torch.cuda.is_available():
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU's memory at most, by PyTorch")
    print(f"{whole:8.2f} s in all: {parity.verdict}, {parity.unjudged} not judged")
    sys.exit(not parity.passes)


if __name__ == "__main__":
    main()
