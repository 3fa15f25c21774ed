"""The two sides of a comparison, each to be run in a process of its own: no memory is shared, and none stays behind.

Run as `python -m shapecheck.onnx.export_verify_process JOB.json`; inputs and outputs are .safetensors files beside the job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shapecheck.contract import Input
from shapecheck.contract.naming import is_feature
from shapecheck.models import diffusers_models
from shapecheck.models.forward_call import added, grouped
from shapecheck.observe.subject import find


@dataclass(frozen=True, slots=True)
class Job:
    """What one side computes."""

    model: str
    """A model to load in PyTorch; for ONNX Runtime the path of the file."""
    precisions: tuple[str, ...]
    """In which to compute with PyTorch; empty for ONNX Runtime."""
    arguments: tuple[tuple[str, str], ...]
    """Input name → argument of forward."""
    residuals: tuple[str, ...]
    """And features, after them."""
    outputs: tuple[str, ...]
    cases: int
    variant: str | None = None
    offline: bool = True

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def arguments(inputs: Sequence[Input]) -> tuple[tuple[str, str], ...]:
    """Input name → argument of forward."""
    return tuple((each.name, each.argument) for each in inputs)


def compute(module: nn.Module, job: Job, folder: Path, precision: str) -> None:
    """PyTorch's outputs for every case."""
    for case in range(job.cases):
        found = _forward(module, job, load_file(folder / f"{case}.safetensors"), getattr(torch, precision))
        _save(job, found, folder, precision, case)


def _forward(module: nn.Module, job: Job, given: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A module's outputs as float32. `given` is cast to `dtype`, less the timestep, which stays float32."""
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    tensors["timestep"] = given["timestep"]
    call = grouped({argument: tensors[name] for name, argument in job.arguments})
    features = [name for name in job.residuals if is_feature(name)]
    call |= added(*([tensors[name] for name in job.residuals if (name in features) is group] for group in (False, True)))
    with torch.inference_mode():
        first, *rest = module(**call, return_dict=False)
    return [each.float() for each in ([*first, *rest] if isinstance(first, (list, tuple)) else [first])]


def _with_torch(job: Job, folder: Path) -> None:
    source = find(job.model, offline=job.offline)
    for precision in job.precisions:
        compute(diffusers_models.load(source, job.variant, getattr(torch, precision)), job, folder, precision)


def _with_onnx_runtime(job: Job, folder: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(job.model, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]  # in the contract's order, under any naming
    ours = [*(name for name, _ in job.arguments), *job.residuals]
    for case in range(job.cases):
        given = load_file(folder / f"{case}.safetensors")
        found = session.run(None, {theirs: given[name].numpy() for theirs, name in zip(names, ours, strict=True)})
        _save(job, [torch.from_numpy(each).float() for each in found], folder, "onnx", case)


def _save(job: Job, found: Sequence[Tensor], folder: Path, side: str, case: int) -> None:
    named = {name: value.contiguous() for name, value in zip(job.outputs, found, strict=True)}
    save_file(named, folder / f"{case}.{side}.safetensors")


def main(path: Path) -> None:
    """Carry out a job."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record |= {name: tuple(record[name]) for name in ("precisions", "residuals", "outputs")}
    job = Job(**record | {"arguments": tuple((name, argument) for name, argument in record["arguments"])})
    (_with_torch if job.precisions else _with_onnx_runtime)(job, path.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
