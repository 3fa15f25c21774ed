"""One tensor beside another, in float64: records, never a bare bool."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shapecheck.contract import show
from shapecheck.parity.results import Effect, Grid, Verdict, Worst

_CELLS = 8
"""Rows and columns of a fingerprint, at most."""


def compare(found: Tensor, expected: Tensor, *, allowed: float, own: float) -> Verdict:
    """How far `found` is from `expected`, tensors of one shape.

    `allowed` is the largest absolute difference that passes, `own` PyTorch's own. Values that are no finite numbers are
    counted apart and never pass; where the shapes differ, or the reference itself is not finite, `fault` says so.
    """
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    shape = tuple(expected.shape)
    if found.shape != expected.shape:
        return Verdict(shape, allowed, own, math.nan, fault=f"its shape is {show(tuple(found.shape))}, PyTorch's {show(shape)}")
    if not torch.isfinite(expected).all():
        return Verdict(shape, allowed, own, math.nan, fault="PyTorch's own values are not all finite numbers")
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    known = torch.isfinite(found)
    difference = torch.where(known, found - expected, torch.zeros_like(found)).abs()
    relative = difference / expected.abs().clamp_min(torch.finfo(torch.float64).tiny)
    rms = float(difference.square().mean().sqrt())
    return Verdict(
        shape, allowed, own, scale,
        absolute=_worst(difference, found, expected) if known.any() else None,
        relative=_worst(relative, found, expected) if known.any() else None,
        rms=rms,
        outside=int((~(known & (difference <= allowed))).sum()),
        nan=int(torch.isnan(found).sum()),
        inf=int(torch.isinf(found).sum()),
        cosine=cosine(found, expected),
        psnr=math.inf if rms == 0 else 20 * math.log10(scale / rms) if scale else -math.inf,
    )  # fmt: skip


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two tensors taken as vectors; not a number where one is zero or not finite."""
    one, other = one.double().flatten(), other.double().flatten()
    length = float(one.norm() * other.norm())
    return float(one @ other) / length if math.isfinite(length) and length > 0 else math.nan


def effect_of(found: Tensor, expected: Tensor, scale: float) -> Effect:
    """A change of the output beside PyTorch's change, both (batch, channels, height, width); `scale` is the largest output."""
    found, expected = found.double().cpu(), expected.double().cpu()
    power = float(expected.flatten() @ expected.flatten())
    strength = float(found.flatten() @ expected.flatten()) / power if power > 0 else math.nan
    pictures = [_picture(expected), _picture(found)]
    largest = max((float(torch.nan_to_num(each, 0, 0, 0).max()) for each in pictures), default=0.0) or 1.0
    ours, theirs = (_grid(torch.nan_to_num(each, 1, 1, 1) / largest) for each in pictures)
    return Effect(strength, cosine(found, expected), float(expected.abs().max()) / scale if scale else math.nan, ours, theirs)


def bad_channels(found: Tensor) -> tuple[int, ...]:
    """The channels of a (batch, channels, …) tensor in which some value is no finite number."""
    bad = ~torch.isfinite(found)
    return tuple(torch.nonzero(bad.transpose(0, 1).flatten(1).any(1)).flatten().tolist())


def _worst(difference: Tensor, found: Tensor, expected: Tensor) -> Worst:
    at = int(difference.argmax())
    index = tuple(int(each) for each in torch.unravel_index(torch.tensor(at), difference.shape))
    return Worst(index, float(found.flatten()[at]), float(expected.flatten()[at]), float(difference.flatten()[at]))


def _picture(change: Tensor) -> Tensor:
    """The magnitude of a change over height and width, averaged to a few cells."""
    plane = change.square().mean(dim=(0, 1)).sqrt()[None, None]
    height, width = (min(_CELLS, side) for side in plane.shape[-2:])
    return torch.nn.functional.adaptive_avg_pool2d(plane, (height, width))[0, 0]


def _grid(picture: Tensor) -> Grid:
    return tuple(tuple(round(float(cell), 4) for cell in row) for row in picture)
