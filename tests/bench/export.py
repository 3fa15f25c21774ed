"""Time, memory and bytes written of exports, beside PyTorch's own exporter with the weights loaded, in turn in one run.

Run it: python tests/bench/export.py [ROUNDS]. It needs 20 GB of disk, 8 GB of memory and a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

SUPPORT = Path(__file__).parents[1] / "support"
BASELINE = """
import warnings
import torch
from diffusers import UNet2DConditionModel
from shapecheck import Geometry, presets

warnings.simplefilter("ignore")
contract, geometry = presets.contract("sd15"), Geometry(2, 64, 64)
tensors = {name: torch.zeros(shape) for name, shape in contract.input_shapes(geometry).items()}
axes = {
    each.name: {axis: str(dim) for axis, dim in enumerate(each.shape) if dim.symbol}
    for each in (*contract.inputs, *contract.slots)
}


class Flat(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sample, timestep, text, *residuals):
        return self.model(
            sample, timestep, text, down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1], return_dict=False,
        )[0]


model = Flat(UNet2DConditionModel.from_pretrained(FOLDER / "unet")).eval()
start = time.perf_counter()
torch.onnx.export(
    model, tuple(tensors.values()), str(OUTPUT), input_names=list(tensors), output_names=["out_sample"],
    dynamic_axes=axes, opset_version=20, dynamo=False,
)
"""
OURS = """
from shapecheck import export
start = time.perf_counter()
export(str(FOLDER), OUTPUT, weights="link")
"""
CASES = [("torch.onnx.export(dynamo=False), SD1.5", "sd15", BASELINE), ("shapecheck, SD1.5", "sd15", OURS)]
CASES += [("shapecheck, SDXL", "sdxl", OURS)]


def measured(code: str, folder: Path) -> tuple[float, float, float]:
    """Seconds of the call, peak resident MiB of its process, and MB written."""
    output = folder / "out" / "unet.onnx" if code is BASELINE else folder / "unet.onnx"
    output.parent.mkdir(exist_ok=True)
    header = (
        f"import json, sys, time; from pathlib import Path; FOLDER, OUTPUT = Path({str(folder)!r}), Path({str(output)!r})\n"
    )
    footer = "\nprint(json.dumps(time.perf_counter() - start), file=sys.__stdout__)"
    command = [sys.executable, "-c", header + code + footer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"a case ended with status {status}")
    written = [output] if code is OURS else [*output.parent.iterdir()]
    size = sum(file.stat().st_size for file in written) / 1e6
    for file in written:
        file.unlink()
    return json.loads(told.splitlines()[-1]), usage.ru_maxrss / 1024, size


def main(rounds: int) -> None:
    """Run every case in turn, several rounds, and print medians and the median of the ratios within each round."""
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("sd15", "sdxl")}
        for name, folder in folders.items():
            command = [sys.executable, str(SUPPORT / "full_size.py"), name, str(folder), "100GB"]
            subprocess.run(command, check=True, capture_output=True)
        found = [[measured(code, folders[name]) for _, name, code in CASES] for _ in range(rounds)]
    rows = []
    for at, (title, _, _) in enumerate(CASES):
        seconds = statistics.median(each[at][0] for each in found)
        ratios = [statistics.median(each[at][0] / each[base][0] for each in found) for base in (0, 1)]
        peak = max(each[at][1] for each in found)
        rows.append((title, f"{seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios), f"{peak:.0f}", f"{found[0][at][2]:.1f}"))
    headers = ("export", "seconds", "ratio to PyTorch's", "ratio to SD1.5", "peak MiB", "MB written")
    print(tabulate(rows, headers, disable_numparse=True))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
