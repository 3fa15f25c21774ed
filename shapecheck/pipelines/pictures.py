"""Pictures of a demo: read, compared and written. In memory they are (height, width, 3) from 0 to 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import whole
from shapecheck.pipelines.demo_record import Change

Floats: TypeAlias = NDArray[np.floating[Any]]


_FLOOR = 1.0
"""How far below the camera."""


_WALL = 6.0
"""How far before it."""


_BALLS = (((-0.85, 0.2, 3.0), 0.8), ((0.2, 0.6, 2.1), 0.4))
"""Middle and radius of each: to the right, down, ahead."""


_BOX = ((0.7, -1.0, 3.2), (1.5, 1.0, 4.2))
"""The corner nearest the camera's left, top and front, and the one opposite."""


def scene(height: int, width: int) -> Floats:
    """The scene at a size in pixels: (height, width, 3), nearest 1 and farthest 0, grey, as depth estimators give it."""
    rays = _rays(height, width)
    things = [_floor(rays), *(_ball(rays, *each) for each in _BALLS), _box(rays)]
    near = np.maximum(np.maximum.reduce(things), 1 / _WALL)
    farthest, nearest = near.min(), near.max()
    grey = (near - farthest) / max(nearest - farthest, 1e-9)
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)


def _rays(height: int, width: int) -> Floats:
    """A direction for every pixel, one ahead; the shorter side of the picture is as wide as it is far."""
    side = min(height, width)
    down, right = np.mgrid[:height, :width].astype(np.float64)
    return np.stack([(right + 0.5 - width / 2) / side, (down + 0.5 - height / 2) / side, np.ones((height, width))], axis=-1)


def _floor(rays: Floats) -> Floats:
    """One over the distance ahead; the same of the others below, 0 where a ray misses."""
    return np.maximum(rays[..., 1], 0) / _FLOOR


def _ball(rays: Floats, middle: tuple[float, float, float], radius: float) -> Floats:
    ahead, square = rays @ np.array(middle), (rays**2).sum(axis=-1)
    inside = ahead**2 - square * (np.dot(middle, middle) - radius**2)
    with np.errstate(divide="ignore"):
        near = square / (ahead - np.sqrt(np.maximum(inside, 0)))
    return np.where(inside > 0, near, 0)


def _box(rays: Floats) -> Floats:
    """Inside the box is where a ray is between all three pairs of its faces."""
    with np.errstate(divide="ignore"):
        faces = np.stack([np.array(corner) / rays for corner in _BOX])
    enters, leaves = faces.min(axis=0).max(axis=-1), faces.max(axis=0).min(axis=-1)
    return np.where(enters < leaves, 1 / np.maximum(enters, 1e-9), 0)


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
