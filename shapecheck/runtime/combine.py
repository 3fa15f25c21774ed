"""What happens to residuals between ControlNets and a UNet, in diffusers' own numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shapecheck.contract import ShapecheckError

Emitted = tuple[Sequence[Tensor], Tensor]
"""What a ControlNet gives: its down residuals, each (batch, channels, height, width), and the mid residual."""


def guess_weights(count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The weight of each of `count` residuals in guess mode, (count,): from 0.1 at the first to 1 at the mid residual."""
    return torch.logspace(-1, 0, count, device=device)


def combined(
    emitted: Sequence[Emitted],
    scales: Sequence[float] | None = None,
    *,
    guess_mode: bool = False,
    unconditional: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """The residuals of one or several ControlNets as a UNet takes them: scaled, weighted and summed, in that order.

    `emitted` are what ControlNets give at `conditioning_scale` 1; `scales` one number for each, 1 by default. `guess_mode`
    weights the residuals by their depth. `unconditional` puts zeros in front of the batch, as pipelines do in guess mode with
    classifier-free guidance, where ControlNets see the conditional half alone. The sums are diffusers' own to the last bit.
    Raises ShapecheckError where there is no ControlNet, or the ControlNets give different numbers of residuals.
    """
    factors = [1.0] * len(emitted) if scales is None else list(scales)
    if not emitted or len(factors) != len(emitted):
        raise ShapecheckError(
            f"{len(emitted)} ControlNets and {len(factors)} scales: give one scale for each, and at least one"
        )
    flat = [[*downs, mid] for downs, mid in emitted]
    if len({len(each) for each in flat}) > 1:
        raise ShapecheckError(
            f"these ControlNets give {', '.join(str(len(each)) for each in flat)} residuals: are they of one family?"
        )
    total = _scaled(flat[0], factors[0], guess_mode)
    for each, factor in zip(flat[1:], factors[1:], strict=True):
        total = [one + other for one, other in zip(total, _scaled(each, factor, guess_mode), strict=True)]
    if unconditional:
        total = [torch.cat([torch.zeros_like(each), each]) for each in total]
    return total[:-1], total[-1]


def _scaled(residuals: Sequence[Tensor], factor: float, guess_mode: bool) -> list[Tensor]:
    if not guess_mode:
        return [each * factor for each in residuals]
    weights = guess_weights(len(residuals), device=residuals[0].device) * factor
    return [each * weight for each, weight in zip(residuals, weights, strict=True)]
