"""Ranges of sizes as a user writes them: `512x512:768x768:1024x1024` in pixels, `1:2:4` for a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import USUAL_TOKENS, Geometry, parse_pair
from shapecheck.tensorrt.profiles import Range


def parse_ranges(
    sizes: Sequence[str], batch: Sequence[str] = ("1",), tokens: str = str(USUAL_TOKENS), *, vae_factor: int = 8
) -> tuple[Range, ...]:
    """Return a range for each of `sizes`, which are MIN:OPT:MAX or one size, each WxH in pixels.

    `batch` is one range for all of them, or one for each; so is MIN:OPT:MAX or one number, as is `tokens`. `vae_factor` is
    the pixels of a latent cell. Raises ShapecheckError if a text is not a range, or pixels fill no whole cells.
    """
    if not sizes:
        raise ShapecheckError("no size was given; give --sizes, such as --sizes 512x512:768x768:1024x1024")
    if len(batch) not in (1, len(sizes)):
        raise ShapecheckError(f"{len(batch)} batches for {len(sizes)} sizes; give one for all, or one for each")
    ranges = []
    for number, size in enumerate(sizes):
        bounds = [("--sizes", size), ("--batch", batch[number % len(batch)]), ("--tokens", tokens)]
        rows = zip(*(_parse_bounds(option, text) for option, text in bounds), strict=True)
        geometries = [
            Geometry.from_px(width, height, batch=images, tokens=length, vae_factor=vae_factor)
            for (width, height), (images,), (length,) in rows
        ]
        ranges.append(Range(*geometries))
    return tuple(ranges)


def format_range(sizes: Range, vae_factor: int = 8) -> str:
    """Return the options that `parse_ranges` reads as this range: `--sizes 512x512:768x768:1024x1024 --batch 1:2:4`."""
    bounds = sizes.geometries
    texts = {
        "--sizes": [f"{geometry.width * vae_factor}x{geometry.height * vae_factor}" for geometry in bounds],
        "--batch": [str(geometry.batch) for geometry in bounds],
    }
    if any(geometry.tokens != USUAL_TOKENS for geometry in bounds):
        texts["--tokens"] = [str(geometry.tokens) for geometry in bounds]
    return " ".join(f"{option} {':'.join(three if len(set(three)) > 1 else three[:1])}" for option, three in texts.items())


def _parse_bounds(option: str, text: str) -> list[tuple[int, ...]]:
    """Return min, opt and max of one option; one value alone stands for all of them."""
    parts = text.split(":")
    if len(parts) not in (1, 3):
        examples = {"--sizes": "512x512:768x768:1024x1024", "--batch": "1:2:4", "--tokens": "77:77:154"}
        raise ShapecheckError(
            f"{option} {text!r}: expected MIN:OPT:MAX, such as {examples[option]}, or one size that never changes"
        )
    bounds: list[tuple[int, ...]] = []
    for part in parts:
        if option != "--sizes" and (not re.fullmatch(r"[0-9]{1,6}", part.strip()) or not int(part)):
            raise ShapecheckError(f"{option}: {part!r} is not a whole number of at least 1")
        bounds.append(parse_pair(part, "WxH in pixels") if option == "--sizes" else (int(part),))
    if any(list(column) != sorted(column) for column in zip(*bounds, strict=True)):
        raise ShapecheckError(f"{option} {text!r} is not a range: give the smallest first, then the usual, then the largest")
    return bounds * 3 if len(bounds) == 1 else bounds
