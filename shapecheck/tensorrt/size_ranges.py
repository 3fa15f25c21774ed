"""Ranges of sizes as a user writes them: `512x512:768x768:1024x1024` in pixels, `1:2:4` for a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import USUAL_TOKENS, Geometry, parse_pair
from shapecheck.contract.size_request import SizeRequest, Triple
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
    whole = parse_size_request(sizes, batch, tokens, vae_factor=vae_factor)
    rows = [zip(*(ranges[symbol] for symbol in ("batch", "h", "w", "tokens")), strict=True) for ranges in whole.ranges]
    return tuple(Range(*(Geometry(*bound) for bound in row)) for row in rows)


def parse_size_request(
    sizes: Sequence[str] = (),
    batch: Sequence[str] = (),
    tokens: str | None = None,
    multiple_of: int | None = None,
    *,
    vae_factor: int = 8,
) -> SizeRequest:
    """Return what the options request together, each as in `parse_ranges`; what is left out is not requested.

    `multiple_of` is in pixels. Raises ShapecheckError if a text is not a range, or pixels fill no whole cells or multiples.
    """
    if sizes and len(batch) not in (0, 1, len(sizes)):
        raise ShapecheckError(f"{len(batch)} batches for {len(sizes)} sizes; give one for all, or one for each")
    multiple = _count_cells(multiple_of, vae_factor) if multiple_of is not None else 0
    ranges = []
    for number in range(len(sizes) or len(batch) or int(tokens is not None)):
        requested: dict[str, Triple] = {}
        if sizes:
            pixels = _parse_bounds("--sizes", sizes[number])
            cells = [Geometry.from_px(width, height, vae_factor=vae_factor) for width, height in pixels]
            for (width, height), at in zip(pixels, cells, strict=True):
                if multiple and (at.height % multiple or at.width % multiple):
                    raise ShapecheckError(f"--sizes {width}x{height}: both must be multiples of {multiple_of} (--multiple-of)")
            requested |= {symbol: _make_triple([at.sizes[symbol] for at in cells]) for symbol in ("h", "w")}
        if batch:
            bounds = _parse_bounds("--batch", batch[number % len(batch)])
            requested["batch"] = _make_triple([images for (images,) in bounds])
        if tokens is not None:
            requested["tokens"] = _make_triple([length for (length,) in _parse_bounds("--tokens", tokens)])
        ranges.append(requested)
    return SizeRequest(tuple(ranges), multiple)


def request_ranges(ranges: Sequence[Range]) -> SizeRequest:
    """Return the request for whole ranges: every axis of each."""
    rows = [[geometry.sizes for geometry in sizes.geometries] for sizes in ranges]
    return SizeRequest(tuple({symbol: _make_triple([sizes[symbol] for sizes in row]) for symbol in row[0]} for row in rows))


def _make_triple(bounds: Sequence[int]) -> Triple:
    least, usual, most = bounds
    return least, usual, most


def _count_cells(multiple_of: int, vae_factor: int) -> int:
    """Return the latent cells of a multiple in pixels."""
    if multiple_of < 1 or multiple_of % vae_factor:
        fault = f"is not a multiple of {vae_factor} (pixels per latent cell)"
        raise ShapecheckError(f"--multiple-of {multiple_of} {fault}; {vae_factor} means every latent size")
    return multiple_of // vae_factor


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
