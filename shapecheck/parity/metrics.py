"""One tensor beside another, in float64 where PyTorch's side runs: records, never a bare bool."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shapecheck.contract import show
from shapecheck.parity.results import Effect, Verdict, Worst

ROOM_IN_FLOAT16: Mapping[str, float] = {"trt": 3.0, "rtx": 3.0, "ort-trt": 3.0}
"""TensorRT sums products in float16 where that is faster, and PyTorch in float32. On an H200 healthy engines of SD1.5 are 3.9
times as far off as PyTorch's own rounding over all values, and 6.3 times in the worst one, of a ControlNet."""


def find_room(backend: str, dtype: str) -> float:
    """Return how many times the usual tolerance a backend has, because of how it computes in a precision."""
    return ROOM_IN_FLOAT16.get(backend, 1.0) if dtype == "float16" else 1.0


def reference_device() -> str:
    """Return the device on which PyTorch's side runs, and on which tensors are compared."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def widen(value: Tensor) -> Tensor:
    """Return a tensor in float64 where tensors are compared. Those of a run are kept on the CPU, and as narrow as they came."""
    return value.detach().to(reference_device(), torch.float64)


def compare(actual: Tensor, expected: Tensor, *, allowed: float, own: float) -> Verdict:
    """Compare a tensor with the reference's.

    `allowed` is the largest absolute difference that passes, `own` PyTorch's own. Values that are not finite are counted apart
    and never pass; if the shapes differ, or the reference itself is not finite, `fault` says so.
    """
    actual, expected = widen(actual), widen(expected)
    shape = tuple(expected.shape)
    if actual.shape != expected.shape:
        fault = f"its shape is {show(tuple(actual.shape))}, PyTorch's {show(shape)}"
        return Verdict(shape, allowed, own, math.nan, fault=fault)
    if not torch.isfinite(expected).all():
        return Verdict(shape, allowed, own, math.nan, fault="PyTorch's own values are not all finite numbers")
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    known = torch.isfinite(actual)
    difference = torch.where(known, actual - expected, torch.zeros_like(actual)).abs()
    relative = difference / expected.abs().clamp_min(torch.finfo(torch.float64).tiny)
    rms = float(difference.square().mean().sqrt())
    return Verdict(
        shape, allowed, own, scale,
        absolute=_find_worst(difference, actual, expected) if known.any() else None,
        relative=_find_worst(relative, actual, expected) if known.any() else None,
        rms=rms,
        outside=int((~(known & (difference <= allowed))).sum()),
        nan=int(torch.isnan(actual).sum()),
        inf=int(torch.isinf(actual).sum()),
        cosine=compute_cosine(actual, expected),
        psnr=math.inf if rms == 0 else 20 * math.log10(scale / rms) if scale else -math.inf,
    )  # fmt: skip


def measure_row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return for each row of a batch the mean square of its error, its largest expected value being 1."""
    difference, expected = (widen(actual) - widen(expected)).flatten(1), widen(expected).flatten(1)
    return difference.square().mean(1) / expected.abs().amax(1).square()


def _find_worst(difference: Tensor, actual: Tensor, expected: Tensor) -> Worst:
    at = int(difference.argmax())
    index = tuple(map(int, torch.unravel_index(torch.tensor(at), difference.shape)))
    return Worst(index, float(actual.flatten()[at]), float(expected.flatten()[at]), float(difference.flatten()[at]))


def compute_cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine between two tensors taken as vectors; NaN if one is zero or not finite."""
    one, other = widen(one).flatten(), widen(other).flatten()
    length = float(one.norm() * other.norm())
    return float(one @ other) / length if math.isfinite(length) and length > 0 else math.nan


def compute_strength(actual: Tensor, expected: Tensor) -> float:
    """Return a change as a share of the expected one, along it; NaN if none is expected."""
    actual, expected = widen(actual).flatten(), widen(expected).flatten()
    power = float(expected @ expected)
    return float(actual @ expected) / power if power > 0 else math.nan


def compare_effects(actual: Tensor, expected: Tensor, scale: float) -> Effect:
    """Compare a change of the output with PyTorch's, both (batch, channels, height, width); `scale` is the largest output."""
    actual, expected = widen(actual), widen(expected)
    pictures = []
    for change in (expected, actual):
        # the magnitude over height and width, averaged to 8×8 cells at most
        plane = change.square().mean(dim=(0, 1)).sqrt()[None, None]
        height, width = (min(8, side) for side in plane.shape[-2:])
        pictures.append(torch.nn.functional.adaptive_avg_pool2d(plane, (height, width))[0, 0])
    largest = max(float(torch.nan_to_num(picture, 0, 0, 0).max()) for picture in pictures) or 1.0
    ours, theirs = (
        tuple(tuple(round(cell, 4) for cell in row) for row in (torch.nan_to_num(picture, 1, 1, 1) / largest).tolist())
        for picture in pictures
    )
    size = float(expected.abs().max()) / scale if scale else math.nan
    return Effect(compute_strength(actual, expected), compute_cosine(actual, expected), size, ours, theirs)
