"""What a text says went wrong, as facts: which operation, which sizes, which names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shapecheck.contract import Shape
from shapecheck.explain.simulate import Stage

SymptomKind = Literal[
    "broadcast", "output", "concat", "rank", "norm", "groups", "index", "keyword", "attention", "reshape", "upsample",
    "pair", "pop", "deprecated", "dtype", "text width", "sample channels", "from_unet", "argument", "value",
    "dimensions", "missing", "unknown", "range", "unequal",
]  # fmt: skip
"""The first line is `simulate.FailureKind`."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """One thing that a text says. A field that it says nothing about is None or empty."""

    kind: SymptomKind
    source: str
    """The tool that prints it: PyTorch, diffusers, ComfyUI, ONNX Runtime, TensorRT, Polygraphy or StreamDiffusion."""
    line: str
    """The words themselves."""
    axis: int | None = None
    wanted: int | None = None
    """Size or number of axes of the model's own tensor; `given` is that of the tensor it received."""
    given: int | None = None
    wanted_shape: Shape = ()
    given_shape: Shape = ()
    stride: int | None = None
    """If sizes are printed as formulas: latent cells along one cell of the model's own tensor."""
    names: tuple[str, ...] = ()
    bounds: tuple[str, str] = ("", "")
    stage: Stage | Literal["nets"] | None = None
    """The place in the UNet, if a traceback shows it; `nets` is the addition of several ControlNets' residuals."""
    elsewhere: str = ""
    """The file that raised it, if a traceback shows one that neither adds nor uses residuals."""
