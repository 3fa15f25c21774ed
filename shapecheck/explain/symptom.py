"""A symptom is a fact in a text about residuals; a pattern finds it: a marker and an expression whose groups are its fields."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shapecheck.contract import Shape
from shapecheck.explain.simulate import FailureKind, Stage

SymptomKind = Literal[
    FailureKind, "pair", "pop", "deprecated", "dtype", "text width", "sample channels", "from_unet", "argument", "value",
    "dimensions", "missing", "unknown", "range", "unequal",
]  # fmt: skip
# Groups of an expression are named after the field of the symptom that they fill; low and high are its bounds.
EXPECTED, ACTUAL, AXIS = r"(?P<expected>\d+)", r"(?P<actual>\d+)", r"(?P<axis>\d)"
EXPECTED_SHAPE, ACTUAL_SHAPE = (rf"[\[(](?P<{shape}>[-\d, ]{{1,200}})[\])]" for shape in ("expected_shape", "actual_shape"))
NAME = r"(?P<name>[\w./:-]{1,200}\w)"
ACTUAL_DTYPE, EXPECTED_DTYPE = (rf"(?P<{bound}>[\w.:]{{1,40}}\w)" for bound in ("low", "high"))


@dataclass(frozen=True, slots=True)
class Symptom:
    """One thing that a text says. A field that it says nothing about is None or empty."""

    kind: SymptomKind
    source: str
    """The tool that prints it: PyTorch, diffusers, ComfyUI, ONNX Runtime, TensorRT, Polygraphy or StreamDiffusion."""
    line: str
    """The words themselves."""
    axis: int | None = None
    expected: int | None = None
    """Size or number of axes of the model's own tensor; `actual` is that of the tensor it received."""
    actual: int | None = None
    expected_shape: Shape = ()
    actual_shape: Shape = ()
    stride: int | None = None
    """If sizes are printed as formulas: latent cells along one cell of the model's own tensor."""
    names: tuple[str, ...] = ()
    bounds: tuple[str, str] = ("", "")
    stage: Stage | Literal["nets"] | None = None
    """The place in the UNet, if a traceback shows it; `nets` is the addition of several ControlNets' residuals."""
    elsewhere: str = ""
    """The file that raised it, if a traceback shows one that neither adds nor uses residuals."""


class MessagePattern(NamedTuple):
    """A message of one tool. Its marker is searched first: plain words are found faster than an expression."""

    kind: SymptomKind
    marker: str
    regex: str = ""
    """Empty if the marker is the whole message."""
    complete: Callable[[Symptom, re.Match[str]], Symptom] | None = None
    """Adds facts that no group holds as they stand."""
    source: str = "PyTorch"

    def make_symptom(self, match: re.Match[str]) -> Symptom:
        """Return the symptom that a match of the expression describes."""
        groups = {name: text for name, text in match.groupdict().items() if text is not None}
        symptom = Symptom(
            self.kind,
            self.source,
            match[0],
            axis=int(groups["axis"]) if "axis" in groups else None,
            expected=parse_size(groups.get("expected", "")),
            actual=parse_size(groups.get("actual", "")),
            expected_shape=parse_shape(groups.get("expected_shape", "")),
            actual_shape=parse_shape(groups.get("actual_shape", "")),
            names=(groups["name"],) if "name" in groups else _find_names(groups.get("names", "")),
            bounds=(groups.get("low", ""), groups.get("high", "")),
        )
        return self.complete(symptom, match) if self.complete else symptom


def parse_size(text: str) -> int | None:
    """Return a size, or None if no tensor can have it."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def parse_shape(text: str) -> Shape:
    """Return the sizes of a shape, -1 for a free one; an empty shape if one is not a number."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"-?\d{1,9}", part) for part in parts) or len(parts) > 8:
        return ()
    return tuple(map(int, parts))


def _find_names(text: str) -> tuple[str, ...]:
    """Return the names between quotation marks by the numbers in them: down_block_2 before down_block_10."""

    def list_numbers(name: str) -> tuple[object, ...]:
        return tuple((int(part[:9]), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))

    return tuple(sorted(re.findall(r"'([^']{1,200})'", text), key=list_numbers))
