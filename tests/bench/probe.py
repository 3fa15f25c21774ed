"""Time and memory of whole processes, as ratios to importing torch and diffusers, taken in turn in one run.

Run it: python tests/bench/probe.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from tabulate import tabulate

ROUNDS = 5
BASELINE = (
    "import of torch and diffusers",
    ["-c", "import torch; from diffusers import UNet2DConditionModel, ControlNetModel"],
)
CASES = [
    BASELINE,
    ("shapecheck probe sd15", ["-m", "shapecheck", "probe", "sd15"]),
    ("shapecheck probe sdxl", ["-m", "shapecheck", "probe", "sdxl"]),
    ("import shapecheck", ["-c", "import shapecheck"]),
    ("python alone", ["-c", "pass"]),
]


def measured(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{arguments} ended with status {status}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Run every case in turn, several rounds, and print medians and the median of the ratios within each round."""
    for _, arguments in CASES:
        measured(arguments)  # fills the caches
    rounds = [[measured(arguments) for _, arguments in CASES] for _ in range(ROUNDS)]
    rows = []
    for at, (name, _) in enumerate(CASES):
        ratio = statistics.median(each[at][0] / each[0][0] for each in rounds)
        seconds = statistics.median(each[at][0] for each in rounds)
        rows.append((name, f"{seconds:.3f}", f"{ratio:.2f}", f"{max(each[at][1] for each in rounds):.0f}"))
    print(tabulate(rows, ("process", "seconds", "ratio", "peak MiB"), disable_numparse=True))


if __name__ == "__main__":
    main()
