"""An exported file's numbers beside PyTorch's: a short parity run in a process of its own.

It needs the memory of one side at a time and leaves none behind, and a system that has too little kills nothing else.
`verify_export` runs `python -m shapecheck.parity.export_check JOB`, which prints the outputs as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.onnx.records import Agreement, Exported
from shapecheck.parity.request import ParityRequest
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.profiles import Range

_MARK = "\nshapecheck outputs: "
"""Stands before the result on the standard output, on which libraries may print."""


def refuse_unverifiable(dtype: str | None, weights: str | None) -> None:
    """Raise ShapecheckError before an export whose numbers could not be compared afterwards."""
    if find_spec("onnxruntime") is None:
        raise ShapecheckError("--verify needs ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu")
    if weights == "none":
        raise ShapecheckError("--verify needs weights; drop --weights none, or --verify")
    if dtype == "bfloat16":
        raise ShapecheckError("--verify cannot run bfloat16: ONNX Runtime computes no bfloat16 convolutions on the CPU")


def estimate_memory(exported: Exported) -> int:
    """Return the bytes that `verify_export` needs at most: for one side at a time with all weights, PyTorch's in float32."""
    before_weights = 0.95e9  # of a process with PyTorch, diffusers and ONNX Runtime
    return int((exported.contract.header.parameters or 0) * 4 * 1.15 + before_weights)


def verify_export(
    exported: Exported,
    model: str | Path,
    *,
    geometries: Sequence[Geometry] = (),
    fp8: Path | None = None,
    variant: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> tuple[Agreement, ...]:
    """Compare a file with the model it was made from: every output, at the given sizes or at two, one of them odd.

    In float32 a difference of 1e-5 of the largest value is allowed, in a half precision or with layers in fp8 twice PyTorch's
    own error. Raises ShapecheckError if a side cannot run.
    """
    refuse_unverifiable(exported.dtype, exported.weights)
    step = exported.contract.divisor
    sizes = geometries or (Geometry(2, 17 * step, 25 * step), Geometry(1, 24 * step, 16 * step))
    job = {
        "model": str(model),
        "onnx": str(exported.path),
        # Of float32 the error is assumed: 1e-5 is ten times the largest difference measured at full size, and a hundredth of a
        # scale wrong by 0.1 %. Of a half precision it is measured.
        "factor": 4 if fp8 is not None else 10 if exported.dtype == "float32" else 2,
        "sizes": [astuple(geometry) for geometry in sizes],
        "fp8": str(fp8) if fp8 is not None else None,
        "variant": variant,
        "offline": offline,
    }
    progress("computing with PyTorch, then with ONNX Runtime")
    command = [sys.executable, "-P", "-m", __name__, json.dumps(job)]  # -P: no modules of the current folder
    # Both sides compute on the CPU: the allowed differences were measured there.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603  # ourselves
    steps = process.stderr.strip().splitlines() or ["no reason given"]
    if process.returncode < 0:
        needed = f"{estimate_memory(exported) / 1e9:.1f} GB of memory"
        raise ShapecheckError(
            f"verifying: the process was killed ({steps[-1][:200]}); it needs about {needed}. The file is written; "
            "verify it on a larger machine"
        )
    if process.returncode:
        raise ShapecheckError(f"verifying: {steps[-1][:600]}")
    rows = json.loads(process.stdout.rpartition(_MARK)[2].splitlines()[0])
    return tuple(Agreement(name, Geometry(*size), *numbers) for name, size, *numbers in rows)


def compare_outputs(job: Mapping[str, Any]) -> Iterator[tuple[str, Geometry, float, float]]:
    """Yield every output at every size: the largest difference, and the allowed one, as shares of the largest value."""
    from shapecheck.parity.plan import plan_outputs
    from shapecheck.parity.run import ParityRun

    sizes = [Geometry(*size) for size in job["sizes"]]
    request = ParityRequest(
        job["model"],
        job["onnx"],
        times_own=job["factor"],
        reference="float32",  # float64 would take twice the memory
        fp8=job.get("fp8"),
        variant=job["variant"],
        offline=job["offline"],
    )
    ranges = tuple(Range(size, size, size) for size in sizes)

    def show_step(step: str, _done: int = 0, _total: int = 0, /) -> None:
        sys.stderr.write(f"{step}\n")  # the last one is quoted if this process is killed

    run = ParityRun(request, ranges=ranges, plan=plan_outputs, explain=False, progress=show_step)
    outputs = {plan.check: plan.output for plan in run.plans["ort"]}
    for result in run.side("ort").results:
        verdict = result.verdict
        if verdict is None or result.geometry is None:
            if result.status == "passed":
                continue
            raise ShapecheckError(result.reason)
        difference, allowed = math.inf, 0.0
        if verdict.nan:
            difference = math.nan
        elif verdict.absolute and not verdict.inf:
            difference = verdict.absolute.difference / verdict.scale
        if not verdict.fault:  # else there is no scale
            allowed = verdict.allowed / verdict.scale
        yield outputs[result.check], result.geometry, difference, allowed


def verify_job(job: str) -> None:
    """Compare the outputs of a job and print them."""
    try:
        rows = [(name, astuple(size), *numbers) for name, size, *numbers in compare_outputs(json.loads(job))]
    except ShapecheckError as error:
        sys.exit(" ".join(str(error).split()))
    sys.stdout.write(f"{_MARK}{json.dumps(rows)}\n")


if __name__ == "__main__":
    verify_job(sys.argv[1])
