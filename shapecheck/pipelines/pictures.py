"""Draw, read, compare and write the pictures of a demo. In memory they are (height, width, 3) from 0 to 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import atomic_write
from shapecheck.pipelines.demo_record import Change

Floats: TypeAlias = NDArray[np.floating[Any]]

# The scene, in units of the camera's height above the floor (right, down, ahead): balls by middle and radius, a box by two
# opposite corners, and how far the wall is.
_BALLS = (((-0.85, 0.2, 3.0), 0.8), ((0.2, 0.6, 2.1), 0.4))
_BOX = ((0.7, -1.0, 3.2), (1.5, 1.0, 4.2))
_WALL = 6.0


def draw_scene(height: int, width: int) -> Floats:
    """Draw the depth map of a floor, two balls and a box before a wall: nearest 1, farthest 0, as depth estimators do."""
    side = min(height, width)
    down, right = np.mgrid[:height, :width].astype(np.float64)
    rays = np.stack([(right + 0.5 - width / 2) / side, (down + 0.5 - height / 2) / side, np.ones((height, width))], axis=-1)
    # Everything is one over the distance ahead, and 0 where a ray misses: the nearest thing is then the maximum.
    things = [np.maximum(rays[..., 1], 0), np.full((height, width), 1 / _WALL)]
    with np.errstate(divide="ignore"):
        for middle, radius in _BALLS:
            ahead, square = rays @ np.array(middle), (rays**2).sum(axis=-1)
            inside = ahead**2 - square * (np.dot(middle, middle) - radius**2)
            things.append(np.where(inside > 0, square / (ahead - np.sqrt(np.maximum(inside, 0))), 0))
        faces = np.stack([np.array(corner) / rays for corner in _BOX])
    # A ray is in the box where it is between all three pairs of faces.
    enters, leaves = faces.min(axis=0).max(axis=-1), faces.max(axis=0).min(axis=-1)
    things.append(np.where(enters < leaves, 1 / np.maximum(enters, 1e-9), 0))
    near = np.maximum.reduce(things)
    grey = (near - near.min()) / max(near.max() - near.min(), 1e-9)
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)


def read_image(path: Path) -> Image.Image:
    """Read an image file. Raises ShapecheckError if Pillow cannot."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # the file is the user's: Pillow may raise anything
        reason = getattr(error, "strerror", None) or error
        raise ShapecheckError(f"cannot read the image {path}: {one_line(reason, longest=200)}") from None


def fit_image(image: Image.Image, height: int, width: int) -> Floats:
    """Scale an image to a size; what does not fit is cut off about its middle."""
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS), dtype=np.float32) / 255


def save_picture(picture: Floats, path: Path) -> None:
    """Write a PNG; NaN becomes black. Raises ShapecheckError if the system refuses."""
    levels = np.rint(np.clip(np.nan_to_num(picture), 0, 1) * 255).astype(np.uint8)
    with atomic_write(path) as partial:
        Image.fromarray(levels).save(partial, format="PNG")


def measure_change(one: Floats, other: Floats) -> Change:
    """Measure how far two pictures are from each other; NaN if one holds a NaN."""
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64)) * 255
    return Change(float(apart.max()), float(apart.mean()))


def amplify_difference(one: Floats, other: Floats) -> tuple[Floats, int]:
    """Return the difference of two pictures times a round number, the largest at which nothing is cut off, and that number."""
    apart, factor = np.abs(one - other), 1
    largest = float(apart.max())
    if 0 < largest <= 1:
        # A difference that takes more than a million to be seen is rounding.
        most = min(1 / largest, 1_000_000)
        digit: int = 10 ** math.floor(math.log10(most))
        factor = digit * math.floor(most / digit)
    return apart * factor, factor
