"""Pictures of a demo: read, compared and written. In memory they are (height, width, 3) from 0 to 1."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from shapecheck.contract import ShapecheckError
from shapecheck.contract.demo import Change
from shapecheck.files import whole
from shapecheck.observe.configfile import one_line
from shapecheck.pipelines.depth import Floats

_LEVELS = 255
_MOST = 1_000_000
"""By which a difference is amplified: beyond that it is rounding, whatever it looks like."""


def read(path: Path) -> Image.Image:
    """A picture from a file. Raises ShapecheckError where it is none."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # the file is the user's: whatever Pillow makes of it is told
        reason = getattr(error, "strerror", None) or error
        raise ShapecheckError(f"cannot read the image {path}: {one_line(reason, longest=200)}") from None


def fitted(picture: Image.Image, height: int, width: int) -> Floats:
    """The picture at that size, its middle where the sides do not fit."""
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS), dtype=np.float32) / _LEVELS


def save(picture: Floats, path: Path) -> None:
    """Write a PNG; what is no number is black. Raises ShapecheckError where the system refuses."""
    levels = np.rint(np.clip(np.nan_to_num(picture), 0, 1) * _LEVELS).astype(np.uint8)
    with whole(path) as partial:
        Image.fromarray(levels).save(partial, format="PNG")


def change(one: Floats, other: Floats) -> Change:
    """How far two pictures are from each other; NaN where one has a NaN."""
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64)) * _LEVELS
    return Change(float(apart.max()), float(apart.mean()))


def amplified(one: Floats, other: Floats) -> tuple[Floats, int]:
    """What two pictures differ by, times a round number, and that number: the largest at which nothing is cut off."""
    apart = np.abs(one - other)
    largest = float(apart.max())
    factor = _rounded_down(min(1 / largest, _MOST)) if 0 < largest <= 1 else 1
    return apart * factor, factor


def _rounded_down(number: float) -> int:
    """To its first digit: 3 for 3.7, 200 for 267.

    >>> _rounded_down(3.7), _rounded_down(267.0)
    (3, 200)
    """
    power: int = 10 ** math.floor(math.log10(number))
    return power * math.floor(number / power)
