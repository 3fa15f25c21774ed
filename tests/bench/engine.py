"""Time and memory of `shapecheck build` beside Polygraphy's own loaders, and of finding the engine again, in turn in one run.

Run it: python tests/bench/engine.py [ROUNDS]. SD1.5 at its real size, random weights, TensorRT for RTX without a GPU. It needs
12 GB of disk, 12 GB of memory and ten minutes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

SUPPORT = Path(__file__).parents[1] / "support"
BASELINE = """
import os, sys
os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import NetworkFromOnnxPath, Profile, engine_bytes_from_network
from shapecheck import parse_ranges, profile_of, read_contract

onnx, plan = sys.argv[1:]
(sizes,) = parse_ranges(["512x512:512x512:904x768"], ["1:2:2"])
profile = Profile()
for each in profile_of(read_contract(onnx), sizes).inputs:
    profile.add(each.name, each.min, each.opt, each.max)
config = CreateConfigRTX(profiles=[profile], compute_capabilities=[(8, 9)])
with open(plan, "wb") as file:
    file.write(engine_bytes_from_network(NetworkFromOnnxPath(onnx, strongly_typed=True), config=config))
"""
ASKED = ["--sizes", "512x512:512x512:904x768", "--batch", "1:2:2", "--target", "rtx", "--compute-capability", "8.9"]


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds of a whole process, and the peak resident MiB of it or of the process it builds in."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{command} ended with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main(rounds: int) -> None:
    """Run every case in turn, several rounds, and print medians and the median of the ratios within each round."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        onnx, plan = str(folder / "unet.onnx"), str(folder / "unet.plan")
        subprocess.run([sys.executable, str(SUPPORT / "full_size.py"), "sd15", place, "100GB"], check=True, capture_output=True)
        subprocess.run([sys.executable, "-m", "shapecheck", "export", place, "-o", onnx], check=True, capture_output=True)
        ours = [sys.executable, "-m", "shapecheck", "build", onnx, "-o", plan, *ASKED]
        cases = {
            "Polygraphy's loaders": [sys.executable, "-c", BASELINE, onnx, str(folder / "theirs.plan")],
            "`shapecheck build`": [*ours, "--force"],
            "the same, found": ours,
        }
        found = [[measured(command) for command in cases.values()] for _ in range(rounds)]
    rows = []
    for at, title in enumerate(cases):
        seconds = statistics.median(each[at][0] for each in found)
        ratio = statistics.median(each[at][0] / each[0][0] for each in found)
        rows.append((title, f"{seconds:.1f}", f"{ratio:.2f}", f"{max(each[at][1] for each in found):.0f}"))
    print(tabulate(rows, ("engine of SD1.5", "seconds", "ratio", "peak MiB"), disable_numparse=True))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
