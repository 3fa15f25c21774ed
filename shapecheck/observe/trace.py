"""Traces of observed runs: numbers and names, so that they can be stored, compared and reasoned about without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from shapecheck.contract.dims import Shape
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.naming import SHAPECHECK, is_feature, name_feature
from shapecheck.contract.records import AddSite

Group = Literal["control", "feature"]
"""The origin of a tensor that a UNet adds: a ControlNet's residual, or a feature of a T2I-Adapter."""


def name_slot(index: int, group: Group = "control") -> str:
    """Return our name of the slot for residual or feature `index`; the mid residual has -1."""
    if group == "feature":
        return name_feature(index)
    return SHAPECHECK.mid if index < 0 else SHAPECHECK.down(index)


class _SlotMember:
    """A member of a trace that belongs to one slot."""

    __slots__ = ()
    index: int
    group: Group

    @property
    def name(self) -> str:
        return name_slot(self.index, self.group)


@dataclass(frozen=True, slots=True)
class Residual(_SlotMember):
    """A residual as a ControlNet emitted it, or a T2I-Adapter's feature.

    `controlnet` counts the ControlNets and after them the adapters; `index` the down residuals from 0, with the mid one -1,
    or the features from 0. `module` is the path of the emitter's module that made it.
    """

    controlnet: int
    index: int
    shape: Shape
    dtype: str
    module: str
    group: Group = "control"


@dataclass(frozen=True, slots=True)
class Arrival(_SlotMember):
    """A residual as the UNet received it.

    `sources` are the (controlnet, index) pairs it was made from; empty if it came from elsewhere.
    `via` names the operations between the two ends other than plain scaling and casting.
    """

    index: int
    shape: Shape
    dtype: str
    sources: tuple[tuple[int, int], ...] = ()
    via: tuple[str, ...] = ()
    group: Group = "control"


@dataclass(frozen=True, slots=True)
class Add(_SlotMember):
    """One addition that consumed a residual inside the UNet; `dtypes` are those of the skip and of the residual."""

    index: int
    skip: Shape
    residual: Shape
    dtypes: tuple[str, str]
    producer: str
    site: AddSite
    up_block: str = ""
    group: Group = "control"


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
        """Return the same call, as far as residuals or as far as features go."""
        return replace(
            self,
            emitted=tuple(residual for residual in self.emitted if residual.group == group),
            arrived=tuple(arrival for arrival in self.arrived if arrival.group == group),
            adds=tuple(add for add in self.adds if add.group == group),
            misunderstood=tuple(pair for pair in self.misunderstood if is_feature(pair[0]) is (group == "feature")),
        )
