"""The sizes that somebody requests of a file: of batch, height, width and tokens each a range, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

from shapecheck.contract.geometry import AXES, Geometry

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SizeRequest:
    """Sizes that have to work; what nobody requests is left to the file."""

    ranges: tuple[Mapping[str, Triple], ...] = ()
    """The least, usual and largest size of each requested axis, by its symbol: batch, h and w, tokens. In latent cells."""
    multiple: int = 0
    """Of height and width only multiples of so many latent cells, and all of them; 0 if nobody says so."""

    @classmethod
    def at(cls, *geometries: Geometry) -> SizeRequest:
        """Return the request for these sizes, each of them whole."""
        return cls(tuple({symbol: (size,) * 3 for symbol, size in geometry.sizes.items()} for geometry in geometries))

    def with_latent(self, height: int, width: int) -> SizeRequest:
        """Return the request with one height and width in latent cells."""
        sides: dict[str, Triple] = {"h": (height,) * 3, "w": (width,) * 3}
        return SizeRequest(tuple({**sizes, **sides} for sizes in self.ranges or ({},)), self.multiple)

    @property
    def symbols(self) -> frozenset[str]:
        """Return the symbols of all axes that are requested in every range."""
        return frozenset.intersection(*map(frozenset, self.ranges)) if self.ranges else frozenset()

    def list_geometries(self, usual: Sequence[Geometry], divisor: int = 1) -> tuple[Geometry, ...]:
        """Return the sizes to try: least, usual and largest of each range, and of heights and widths an odd one between.

        An axis that is not requested is as in `usual`, which are all returned if only batch or tokens are, or nothing.
        `divisor` is that of the model. Raises ShapecheckError if a size is below 1.
        """
        step = lcm(divisor, self.multiple or 1)
        coarse = tuple(round_up(geometry, step) if self.multiple else geometry for geometry in usual)
        geometries: list[Geometry] = []
        for sizes in self.ranges:
            bounds = [{symbol: triple[bound] for symbol, triple in sizes.items()} for bound in range(3)]
            if "h" in sizes:
                between = {symbol: (triple[0] + triple[2]) // 2 for symbol, triple in sizes.items()}
                if "batch" in sizes:
                    between["batch"] = (sizes["batch"][0] + sizes["batch"][2] + 1) // 2
                between |= {symbol: _choose_odd(sizes[symbol][0], sizes[symbol][2], step) for symbol in ("h", "w")}
                # The smallest batch is the cheapest; who wants another requests it.
                least = min(coarse, key=lambda geometry: geometry.batch, default=Geometry(1, step, step))
                geometries += [least.with_sizes(bound) for bound in (*bounds, between)]
            else:
                distinct = [bound for number, bound in enumerate(bounds) if bound not in bounds[:number]]
                count = max(len(coarse), len(distinct)) if coarse else 0
                pairs = [(coarse[number % len(coarse)], distinct[number % len(distinct)]) for number in range(count)]
                geometries += [geometry.with_sizes(bound) for geometry, bound in pairs]
        return tuple(dict.fromkeys(geometries or coarse))


def round_up(geometry: Geometry, step: int) -> Geometry:
    """Return the geometry with height and width at the next multiples, and not equal if they were not."""
    height, width = (-(-side // step) * step for side in (geometry.height, geometry.width))
    if height == width and geometry.height != geometry.width:  # or the two could be exchanged unseen
        width += step
    return replace(geometry, height=height, width=width)


def _choose_odd(least: int, most: int, step: int) -> int:
    """Return the middle one of the odd multiples between two sizes, or of all if none is odd; one of them if there is none."""
    multiples = range(-(-least // step), most // step + 1)
    candidates = [number for number in multiples if number % 2] or list(multiples)
    return candidates[len(candidates) // 2] * step if candidates else least


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return sizes by symbol in words: `batch 2, height 64, 77 text tokens`."""
    texts = {symbol: f"{axis} {sizes[symbol]}" for symbol, axis in AXES.items() if symbol in sizes and symbol != "tokens"}
    if {"h", "w"} <= texts.keys():
        texts["h"] = f"latent {sizes['h']}×{sizes['w']}"
        del texts["w"]
    if "tokens" in sizes:
        texts["tokens"] = f"{sizes['tokens']} text tokens"
    return ", ".join(texts.values())
