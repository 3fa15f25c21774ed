"""An exported file's numbers beside PyTorch's, on the CPU at two sizes, one of them odd."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.onnx.export_verify_process import Job, arguments, compute
from shapecheck.onnx.records import Agreement, Exported
from shapecheck.progress import Progress, silent

_EXACT = 1e-5
"""Allowed in float32: ten times the largest difference measured at full size, a hundredth of a scale wrong by 0.1 %."""


_TIMES_OWN = 2
"""Allowed in a half precision: this many times PyTorch's own error there."""


_PROCESS = 0.6e9
"""Bytes of a process with PyTorch before any weights."""


def refuse_unverifiable(dtype: str | None, weights: str | None) -> None:
    """Raise ShapecheckError before an export whose numbers could not be compared afterwards."""
    if find_spec("onnxruntime") is None:
        raise ShapecheckError("--verify needs ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu")
    if weights == "none":
        raise ShapecheckError("--verify needs weights; drop --weights none, or --verify")
    if dtype == "bfloat16":
        raise ShapecheckError("--verify cannot run bfloat16: ONNX Runtime computes no bfloat16 convolutions on the CPU")


def memory_needed(exported: Exported) -> int:
    """Bytes that `verify` takes at its largest: one side after the other, each with all the weights, PyTorch's as float32."""
    return int((exported.contract.header.parameters or 0) * 4 * 1.15 + _PROCESS)


def verify(
    exported: Exported,
    model: str | Path | nn.Module,
    *,
    geometries: Sequence[Geometry] | None = None,
    variant: str | None = None,
    offline: bool = False,
    progress: Progress = silent,
) -> tuple[Agreement, ...]:
    """Compare the file with the model it was made from: every output, at the given sizes or at two, one of them odd.

    Each side runs in a process of its own, one after the other; a live module runs where it is. In float32 a difference of
    1e-5 of the largest value is allowed, in a half precision twice PyTorch's own error. Raises ShapecheckError where a side
    cannot run.
    """
    refuse_unverifiable(exported.dtype, exported.weights)
    contract = exported.contract
    outputs = tuple(slot.name for slot in contract.slots) if contract.role == "controlnet" else ("out_sample",)
    residuals = tuple(slot.name for slot in contract.residuals) if contract.role == "unet" else ()
    precisions = tuple(dict.fromkeys(("float32", exported.dtype)))
    geometries = geometries or _geometries(contract.divisor)
    name = "" if isinstance(model, nn.Module) else str(model)
    job = Job(name, precisions, arguments(contract.inputs), residuals, outputs, len(geometries), variant, offline)
    with tempfile.TemporaryDirectory(prefix="shapecheck-") as place:
        folder = Path(place)
        for case, geometry in enumerate(geometries):
            save_file(_inputs(exported, geometry, case), folder / f"{case}.safetensors")
        progress("computing with PyTorch")
        if isinstance(model, nn.Module):
            _run_live(model, job, folder)
        else:
            _run(job, folder, "PyTorch", memory_needed(exported))
        progress("computing with ONNX Runtime")
        onnx_job = replace(job, model=str(exported.path.absolute()), precisions=())
        _run(onnx_job, folder, "ONNX Runtime", memory_needed(exported))
        return tuple(
            each for case, geometry in enumerate(geometries) for each in _compared(folder, case, geometry, exported.dtype)
        )


def _geometries(divisor: int) -> tuple[Geometry, ...]:
    return Geometry(2, 17 * divisor, 25 * divisor), Geometry(1, 24 * divisor, 16 * divisor)


def _inputs(exported: Exported, geometry: Geometry, seed: int) -> dict[str, Tensor]:
    """Random numbers for every input, each of its own; each row has its own timestep."""
    generator = torch.Generator().manual_seed(seed)
    contract = exported.contract
    dtypes = {each.name: getattr(torch, each.dtype) for each in contract.inputs}
    given = {}
    for name, shape in contract.input_shapes(geometry).items():
        dtype = dtypes.get(name, getattr(torch, exported.dtype))
        noise = torch.randn(shape, generator=generator)
        given[name] = noise.to(dtype) if dtype.is_floating_point else torch.arange(shape[0], dtype=dtype)
    given["timestep"] = torch.linspace(7, 901, geometry.batch)
    return given


def _run_live(module: nn.Module, job: Job, folder: Path) -> None:
    """PyTorch's side where the only copy of the weights is in this process."""
    for precision in job.precisions:
        compute(copy.deepcopy(module).to("cpu", getattr(torch, precision)).eval(), job, folder, precision)


def _run(job: Job, folder: Path, side: str, needed: int) -> None:
    path = folder / "job.json"
    job.write(path)
    command = [
        sys.executable,
        "-P",
        "-m",
        "shapecheck.onnx.export_verify_process",
        str(path),
    ]  # -P: no modules of the current folder
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  # this interpreter, our own module
    if done.returncode < 0:
        raise ShapecheckError(
            f"verifying: {side}'s process was killed; it needs about {needed / 1e9:.1f} GB of memory. The file is written; "
            "verify it on a larger machine"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ShapecheckError(f"verifying: {side} could not run the model: {reason[:600]}")


def _compared(folder: Path, case: int, geometry: Geometry, dtype: str) -> list[Agreement]:
    expected, own, found = (load_file(folder / f"{case}.{side}.safetensors") for side in ("float32", dtype, "onnx"))
    return [
        Agreement(
            name,
            geometry,
            _difference(found[name], expected[name]),
            _EXACT if dtype == "float32" else _TIMES_OWN * _difference(own[name], expected[name]),
        )
        for name in expected
    ]


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected value, in float64; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    largest = expected.double().abs().max()
    if largest == 0:
        raise ShapecheckError(
            "verifying: PyTorch's output is zero everywhere, so nothing can be compared; an untrained ControlNet?"
        )
    return float((found.double() - expected.double()).abs().max() / largest)
