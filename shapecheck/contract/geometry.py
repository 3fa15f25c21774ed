"""One concrete input size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from shapecheck.contract.errors import ShapecheckError


@dataclass(frozen=True, slots=True)
class Geometry:
    """Batch, latent height and width in latent cells, and text tokens. Pixels only where a name ends in `_px`."""

    batch: int
    height: int
    width: int
    tokens: int = 77

    def __post_init__(self) -> None:
        for each in fields(self):
            size = getattr(self, each.name)
            if type(size) is not int or size < 1:
                raise ShapecheckError(f"{each.name} must be a whole number of at least 1, got {size!r}")

    @classmethod
    def from_px(cls, width_px: int, height_px: int, *, batch: int = 1, tokens: int = 77, vae_factor: int = 8) -> Geometry:
        """The latent geometry of an image; its sides must be multiples of `vae_factor` (pixels a latent cell)."""
        for name, side in (("width", width_px), ("height", height_px)):
            if side % vae_factor:
                lower = side - side % vae_factor
                nearest = " or ".join(str(size) for size in (lower, lower + vae_factor) if size)
                raise ShapecheckError(
                    f"{width_px}x{height_px} pixels: the {name} {side} is no multiple of {vae_factor}, "
                    f"the pixels one latent cell covers; the nearest sizes are {nearest}"
                )
        return cls(batch, height_px // vae_factor, width_px // vae_factor, tokens)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The value of every symbol a dimension may use."""
        return {"batch": self.batch, "h": self.height, "w": self.width, "tokens": self.tokens}

    def __str__(self) -> str:
        return f"batch {self.batch}, latent {self.height}×{self.width}"


def parse_pair(text: str, form: str) -> tuple[int, int]:
    """Two whole numbers out of `904x512`. Raises ShapecheckError showing the form expected."""
    match = re.fullmatch(r"([0-9]{1,6})[xX×]([0-9]{1,6})", text.strip())
    if not match or not int(match[1]) or not int(match[2]):
        raise ShapecheckError(f"{text!r} is no size; expected {form}: two whole numbers with an x between them")
    return int(match[1]), int(match[2])
