"""One concrete input size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shapecheck.contract.dims import Dim, Shape
from shapecheck.contract.errors import ShapecheckError

AXES = {"batch": "batch", "h": "height", "w": "width", "tokens": "tokens"}
"""From every symbol a dimension may use to the field of `Geometry` that holds its size."""
USUAL_TOKENS = 77


@dataclass(frozen=True, slots=True)
class Geometry:
    """Batch, latent height and width in latent cells, and text tokens. Pixels only where a name ends in `_px`."""

    batch: int
    height: int
    width: int
    tokens: int = USUAL_TOKENS

    def __post_init__(self) -> None:
        for name in AXES.values():
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ShapecheckError(f"{name} must be a whole number of at least 1, got {size!r}")

    @classmethod
    def from_px(
        cls, width_px: int, height_px: int, *, batch: int = 1, tokens: int = USUAL_TOKENS, vae_factor: int = 8
    ) -> Geometry:
        """Return the latent geometry of an image; its sides must be multiples of `vae_factor` (pixels per latent cell)."""
        for name, side in (("width", width_px), ("height", height_px)):
            if excess := side % vae_factor:
                nearest = ", ".join(str(size) for size in (side - excess, side - excess + vae_factor) if size)
                fault = f"{name} {side} is not a multiple of {vae_factor} (pixels per latent cell); nearest: {nearest}"
                raise ShapecheckError(f"{width_px}x{height_px} pixels: {fault}")
        return cls(batch, height_px // vae_factor, width_px // vae_factor, tokens)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Return the value of every symbol a dimension may use."""
        return {"batch": self.batch, "h": self.height, "w": self.width, "tokens": self.tokens}

    def with_sizes(self, sizes: Mapping[str, int]) -> Geometry:
        """Return this geometry with other sizes for some symbols."""
        return replace(self, **{AXES[symbol]: size for symbol, size in sizes.items()})

    def shape_of(self, rule: tuple[Dim, ...]) -> Shape:
        """Return the numbers of a shape at this geometry."""
        sizes = self.sizes
        return tuple(dim.at(sizes) for dim in rule)

    def __str__(self) -> str:
        return f"batch {self.batch}, latent {self.height}×{self.width}"


def parse_pair(text: str, form: str) -> tuple[int, int]:
    """Return the two whole numbers in `904x512`. Raises ShapecheckError showing the expected form."""
    match = re.fullmatch(r"([0-9]{1,6})[xX×]([0-9]{1,6})", text.strip())
    if not match or not int(match[1]) or not int(match[2]):
        raise ShapecheckError(f"{text!r} is not a size; expected {form}: two whole numbers with an x between them")
    return int(match[1]), int(match[2])
