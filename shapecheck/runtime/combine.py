"""Combine the residuals of ControlNets as diffusers does between them and a UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shapecheck.contract import ShapecheckError

Emitted = tuple[Sequence[Tensor], Tensor]
"""The return value of a ControlNet: its down residuals, each (batch, channels, height, width), and the mid residual."""


def combined(
    emitted: Sequence[Emitted],
    scales: Sequence[float] | None = None,
    *,
    guess_mode: bool = False,
    unconditional: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Return the residuals of one or several ControlNets as a UNet takes them: scaled, weighted and summed, in that order.

    `emitted` are what ControlNets return at `conditioning_scale` 1; `scales` one number for each, 1 by default. `guess_mode`
    weights the residuals by their depth, from 0.1 at the first to 1 at the mid residual. `unconditional` puts zeros in front
    of the batch, as pipelines do in guess mode with classifier-free guidance, where ControlNets see the conditional half
    alone. The sums are diffusers' own to the last bit. Raises ShapecheckError if there is no ControlNet, or the ControlNets
    return different numbers of residuals.
    """
    factors = [1.0] * len(emitted) if scales is None else list(scales)
    if not emitted:
        raise ShapecheckError("got no ControlNets; pass at least one, and one scale for each")
    if len(factors) != len(emitted):
        raise ShapecheckError(f"got {len(emitted)} ControlNets and {len(factors)} scales; pass one scale for each")
    counts = [len(downs) + 1 for downs, _ in emitted]
    if len(set(counts)) > 1:
        raise ShapecheckError(f"these ControlNets return {', '.join(map(str, counts))} residuals: are they of one family?")
    total: list[Tensor] = []
    for (downs, mid), factor in zip(emitted, factors, strict=True):
        scaled = [*downs, mid]
        weights: Sequence[Tensor | float] = [factor] * len(scaled)
        if guess_mode:
            weights = list(torch.logspace(-1, 0, len(scaled), device=scaled[0].device) * factor)
        scaled = [residual * weight for residual, weight in zip(scaled, weights, strict=True)]
        total = [one + other for one, other in zip(total, scaled, strict=True)] if total else scaled
    if unconditional:
        total = [torch.cat([torch.zeros_like(residual), residual]) for residual in total]
    return total[:-1], total[-1]
