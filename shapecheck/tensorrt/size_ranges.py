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
    """A range for each of `sizes`, which are MIN:OPT:MAX or one size, each WxH in pixels.

    `batch` is one range for all of them, or one for each; so is MIN:OPT:MAX or one number, as is `tokens`. `vae_factor` is
    the pixels of a latent cell. Raises ShapecheckError where a text is no range, or pixels fill no whole cells.
    """
    if not sizes:
        raise ShapecheckError("no size was given; give --sizes, such as --sizes 512x512:768x768:1024x1024")
    if len(batch) not in (1, len(sizes)):
        raise ShapecheckError(f"{len(batch)} batches for {len(sizes)} sizes; give one for all, or one for each")
    batches = batch if len(batch) == len(sizes) else [batch[0]] * len(sizes)
    return tuple(_range(size, number, tokens, vae_factor) for size, number in zip(sizes, batches, strict=True))


def written(sizes: Range, vae_factor: int = 8) -> str:
    """The options that `parse_ranges` reads as this range: `--sizes 512x512:768x768:1024x1024 --batch 1:2:4`."""
    sides = [f"{each.width * vae_factor}x{each.height * vae_factor}" for each in sizes.geometries]
    batch, tokens = ([str(getattr(each, field)) for each in sizes.geometries] for field in ("batch", "tokens"))
    told = {"--sizes": sides, "--batch": batch} | ({"--tokens": tokens} if set(tokens) != {str(USUAL_TOKENS)} else {})
    return " ".join(f"{option} {':'.join(three if len(set(three)) > 1 else three[:1])}" for option, three in told.items())


def _range(sizes: str, batch: str, tokens: str, vae_factor: int) -> Range:
    given = {"--sizes": sizes, "--batch": batch, "--tokens": tokens}
    sides = [parse_pair(each, "WxH in pixels") for each in _three(sizes, "--sizes", "512x512:768x768:1024x1024")]
    batches = [_whole(each, "--batch") for each in _three(batch, "--batch", "1:2:4")]
    lengths = [_whole(each, "--tokens") for each in _three(tokens, "--tokens", "77:77:154")]
    columns = {"--sizes": list(zip(*sides, strict=True)), "--batch": [tuple(batches)], "--tokens": [tuple(lengths)]}
    for option, several in columns.items():
        if any(list(column) != sorted(column) for column in several):
            raise ShapecheckError(
                f"{option} {given[option]!r} is not a range: give the smallest first, then the usual, then the largest"
            )
    return Range(
        *(
            Geometry.from_px(width, height, batch=number, tokens=length, vae_factor=vae_factor)
            for (width, height), number, length in zip(sides, batches, lengths, strict=True)
        )
    )


def _three(text: str, option: str, example: str) -> list[str]:
    """The three bounds; one alone stands for all of them."""
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise ShapecheckError(f"{option} {text!r}: expected MIN:OPT:MAX, such as {example}, or one size that never changes")
    return parts * 3 if len(parts) == 1 else parts


def _whole(text: str, option: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text.strip()) or not int(text):
        raise ShapecheckError(f"{option}: {text!r} is not a whole number from 1 on")
    return int(text)
