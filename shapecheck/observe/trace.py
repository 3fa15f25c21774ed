"""What one observed run saw: numbers and names, so that it can be stored, compared and reasoned about without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from shapecheck.contract.dims import Shape
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.naming import SHAPECHECK, is_feature, name_feature
from shapecheck.contract.records import AddSite

Group = Literal["control", "feature"]
"""What a tensor is to the UNet: a ControlNet's residual, or a feature of a T2I-Adapter."""


def name_slot(index: int, group: Group = "control") -> str:
    """Our name of the slot that residual or feature `index` is for; the mid residual has -1."""
    if group == "feature":
        return name_feature(index)
    return SHAPECHECK.mid if index < 0 else SHAPECHECK.down(index)


@dataclass(frozen=True, slots=True)
class Residual:
    """A residual as a ControlNet emitted it, or a T2I-Adapter's feature.

    `controlnet` counts the ControlNets and after them the adapters; `index` the down residuals from 0, with the mid one -1,
    or the features from 0.
    """

    controlnet: int
    index: int
    shape: Shape
    dtype: str
    module: str
    """Path of the module of the ControlNet that made it."""
    group: Group = "control"

    @property
    def name(self) -> str:
        """Of the slot it is for."""
        return name_slot(self.index, self.group)


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
    group: Group = "control"

    @property
    def name(self) -> str:
        """Of the slot it was given for."""
        return name_slot(self.index, self.group)


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
    group: Group = "control"

    @property
    def name(self) -> str:
        """Of the slot."""
        return name_slot(self.index, self.group)


@dataclass(frozen=True, slots=True)
class Trace:
    """One call of the UNet, with what ControlNets and T2I-Adapters emitted for it.

    `misunderstood` are residuals that something other than an addition took: slot, and the operation and its place.
    `refused` is the text of the exception that ended the UNet's run, else empty.
    """

    geometry: Geometry
    emitted: tuple[Residual, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    adds: tuple[Add, ...] = ()
    misunderstood: tuple[tuple[str, str], ...] = ()
    refused: str = ""

    def only(self, group: Group) -> Trace:
        """The same call, as far as residuals or as far as features go."""
        return replace(
            self,
            emitted=tuple(each for each in self.emitted if each.group == group),
            arrived=tuple(each for each in self.arrived if each.group == group),
            adds=tuple(each for each in self.adds if each.group == group),
            misunderstood=tuple(each for each in self.misunderstood if is_feature(each[0]) is (group == "feature")),
        )
