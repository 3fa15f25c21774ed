"""Well-known models: their configs, and the contracts observed from them. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from shapecheck.contract import Contract, ShapecheckError

_FOLDER = files(__name__)
Kind = Literal["unet", "controlnet", "adapter"]
"""The role of a model; an adapter is a T2I-Adapter."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A well-known model: its config, and where that was read."""

    name: str
    kind: Kind
    title: str
    family: str
    """The usual name of the architecture, shared by presets that differ only in size, precision or training."""
    hub_ids: tuple[str, ...]
    checked: str
    verified: bool
    config: Mapping[str, Any]
    vae_factor: int = 8


@cache
def names() -> tuple[str, ...]:
    """Return the names of all presets, sorted."""
    return tuple(sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json")))


@cache
def load(name: str) -> Preset:
    """Return the preset of that name. Raises ShapecheckError listing the known ones."""
    if name not in names():
        raise ShapecheckError(f"no preset {name!r}; known: {', '.join(names())}")
    record = json.loads(_FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return Preset(**record | {"hub_ids": tuple(record["hub_ids"])})


@cache
def contract(name: str) -> Contract:
    """Return the contract saved for a UNet preset; a test keeps it equal to a fresh observation."""
    return Contract.from_json(_FOLDER.joinpath("contracts", f"{load(name).name}.json").read_text(encoding="utf-8"))


@cache
def contracts() -> Mapping[str, Contract]:
    """Return preset name → saved contract, of every UNet preset."""
    return {name: contract(name) for name in names() if load(name).kind == "unet"}
