"""What a text says went wrong, as facts: which operation, which sizes, which names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shapecheck.contract import Shape
from shapecheck.explain.simulate import Stage

SymptomKind = Literal[
    "broadcast", "output", "concat", "rank", "norm", "groups", "index", "keyword", "attention", "reshape",
    "upsample",  # as outcome.Kind
    "pair", "pop", "deprecated", "dtype", "text width", "sample channels", "from_unet", "argument", "value",
    "dimensions", "missing", "unknown", "range", "unequal",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Symptom:
    """One thing a text says. What it does not say is None or empty."""

    kind: SymptomKind
    source: str
    """Who says it: PyTorch, diffusers, ComfyUI, ONNX Runtime, TensorRT, Polygraphy, StreamDiffusion."""
    line: str
    """The words themselves."""
    axis: int | None = None
    wanted: int | None = None
    """The size, or the axes, that the model's own tensor has."""
    given: int | None = None
    """The same of what it was given."""
    wanted_shape: Shape = ()
    given_shape: Shape = ()
    stride: int | None = None
    """Where sizes are told as formulas: latent cells along one cell of the model's own tensor."""
    names: tuple[str, ...] = ()
    """Inputs the text names."""
    bounds: tuple[str, str] = ("", "")
    stage: Stage | Literal["nets"] | None = None
    """Where in the UNet, where a traceback shows it; `nets`: where several ControlNets' residuals are added to one another."""
    elsewhere: str = ""
    """The file it was raised in, where a traceback shows one that neither adds residuals nor takes them."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Every size told of what was given."""
        single = () if self.given is None else (self.given,)
        return tuple(dict.fromkeys((*single, *self.given_shape)))
