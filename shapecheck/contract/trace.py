"""What one observed run saw: numbers and names, so that it can be stored, compared and reasoned about without torch."""

from __future__ import annotations

from dataclasses import dataclass

from shapecheck.contract.dims import Shape
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.records import AddSite


@dataclass(frozen=True, slots=True)
class Residual:
    """A residual as a ControlNet emitted it. `index` counts the down residuals from 0; the mid one is -1."""

    controlnet: int
    index: int
    shape: Shape
    dtype: str
    module: str
    """Path of the module of the ControlNet that made it."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A residual as the UNet received it.

    `sources` are the (controlnet, index) pairs it was made from; empty where it came from elsewhere.
    `via` names the operations between the two ends other than plain scaling and casting.
    """

    index: int
    shape: Shape
    dtype: str
    sources: tuple[tuple[int, int], ...] = ()
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Add:
    """One addition that consumed a residual inside the UNet."""

    index: int
    skip: Shape
    residual: Shape
    dtypes: tuple[str, str]
    producer: str
    site: AddSite
    up_block: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """One call of the UNet, with what the ControlNets emitted for it.

    `misunderstood` are residuals that something other than an addition took: index, and the operation and its place.
    `refused` is the text of the exception that ended the UNet's run, else empty.
    """

    geometry: Geometry
    emitted: tuple[Residual, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    adds: tuple[Add, ...] = ()
    misunderstood: tuple[tuple[int, str], ...] = ()
    refused: str = ""
