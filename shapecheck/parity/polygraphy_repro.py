"""A Polygraphy command that shows a difference without shapecheck."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapecheck.files import atomic_write
from shapecheck.onnx.file import LARGEST, OnnxFile

if TYPE_CHECKING:
    from torch import Tensor


INPUTS, OUTPUTS = "inputs.json", "torch.json"
_PROVIDERS = {"ort-cuda": "cuda", "ort-trt": "tensorrt"}


def reproduce(
    file: OnnxFile,
    inputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    folder: Path,
    *,
    allowed: float,
    backend: str = "ort",
) -> str:
    """Write `inputs.json` and `torch.json` for Polygraphy into a folder. Return the command that compares with them.

    `inputs` and `expected` are by the file's own names of its inputs and values; `allowed` is the largest absolute difference.
    The command fails if a value differs by more or is not finite. Nothing is written, and the command is empty, if Polygraphy
    is not installed, if `allowed` is not finite, or if values inside a model of more than 2 GiB would have to be marked. Raises
    ShapecheckError if the folder cannot be written.
    """
    outputs = {value.name for value in file.proto.graph.output}
    unmarked = [name for name in expected if name not in outputs]
    # To mark outputs, Polygraphy puts model and weights into one message of protobuf.
    if not math.isfinite(allowed) or (unmarked and file.size >= LARGEST):
        return ""
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
    except ImportError:
        return ""
    result = IterationResult(_to_arrays(expected), runner_name="PyTorch")
    for name, content in ((INPUTS, [_to_arrays(inputs)]), (OUTPUTS, RunResults([("PyTorch", [result])]))):
        with atomic_write(folder / name) as partial:
            save_json(content, str(partial))
    command = ["polygraphy", "run", str(file), "--onnxrt"]
    command += ["--providers", _PROVIDERS[backend]] if backend in _PROVIDERS else []
    command += ["--onnx-outputs", *unmarked] if unmarked else []
    command += ["--load-inputs", str(folder / INPUTS), "--load-outputs", str(folder / OUTPUTS)]
    return shlex.join([*command, "--atol", f"{allowed:.6g}", "--rtol", "0", "--validate"])


def _to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert to numpy's arrays, which know no bfloat16."""
    known = {name: value.float() if str(value.dtype) == "torch.bfloat16" else value for name, value in tensors.items()}
    return {name: value.detach().cpu().numpy() for name, value in known.items()}
