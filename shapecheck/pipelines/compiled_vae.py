"""Compile the decoder of a pipeline's VAE, which turns latents into a picture, where it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.contract.errors import one_line

_log = logging.getLogger(__name__)


def find_decoder(vae: Any) -> torch.nn.Module:
    """Return the decoder of a VAE. Raises ShapecheckError if it has none, or there is no VAE."""
    decoder = getattr(vae, "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        raise ShapecheckError("vae=True: the pipeline holds no VAE with a decoder")
    return decoder


def compile_decoder(vae: Any, geometry: Geometry) -> Callable[[], None]:
    """Compile a VAE's decoder at one size, a picture at a time, and return what undoes it.

    One that cannot be compiled stays as it is, which is logged. Raises ShapecheckError if there is none.
    """
    decoder = find_decoder(vae)
    compiled: Any = torch.compile(decoder)
    try:
        weight, channels = next(decoder.parameters()), int(vae.config.latent_channels)
        latents = torch.zeros(1, channels, geometry.height, geometry.width, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            compiled(latents)
    except Exception as error:  # a compiler may raise anything
        _log.warning("the VAE's decoder stays as it is: %s", one_line(f"{type(error).__name__}: {error}", longest=300))
        return lambda: None
    vae.decoder = compiled
    _log.info("the VAE's decoder is compiled")

    def undo() -> None:
        if vae.decoder is compiled:
            vae.decoder = decoder

    return undo
