"""A depth map to control a picture with, made rather than downloaded: a floor, two balls and a box before a wall."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

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
