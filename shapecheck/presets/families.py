"""The well-known models that a contract may be one of: all that fit, none claimed falsely."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shapecheck import presets
from shapecheck.contract import Config, Contract

_NOT_ARCHITECTURE = ("sample_size", "upcast_attention", "dropout")


def find_families(contract: Contract) -> tuple[str, ...]:
    """Return the presets with this architecture; several if they differ only in size, precision or training."""
    own = extract_architecture(contract)
    return tuple(name for name, known in presets.contracts().items() if extract_architecture(known) == own)


def describe_families(contract: Contract) -> str:
    """Return the families in words: `SD2.1 (presets: sd-turbo, sd21, sd21-base)`, or `no known family`."""
    fits = find_families(contract)
    known = ", ".join(dict.fromkeys(presets.load(name).family for name in fits))
    return f"{known} (presets: {', '.join(fits)})" if fits else "no known family"


def extract_architecture(contract: Contract) -> tuple[object, ...]:
    """Return a value that is equal for two models if ControlNets, exports and engines of one are built like the other's.

    Leaves out the native size and numeric settings; an absent setting and a false one are the same, and so are
    a number and a list of that number, and a mirror image by default and spelt out.
    """
    config = {key: value for key, value in _normalize(contract.config).items() if key not in _NOT_ARCHITECTURE}
    slots = tuple((slot.name, slot.skip, slot.producer) for slot in contract.slots)
    return contract.class_name, contract.inputs, slots, tuple(config.items())


def find_sharing(config: Mapping[str, Any], keys: Collection[str]) -> tuple[str, ...]:
    """Return the UNet presets with these settings of a configuration, however they are spelt, as above."""

    def select(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in _normalize(settings).items() if key in keys}

    expected = select(config)
    return tuple(name for name, known in presets.contracts().items() if select(known.config) == expected)


def _normalize(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not absent or false, each in one spelling."""
    settings = {key: short for key, value in Config(config).items() if (short := _shorten(value))}
    depths, upward = settings.get("transformer_layers_per_block"), settings.get("reverse_transformer_layers_per_block")
    if upward and upward == (depths[::-1] if isinstance(depths, tuple) else depths):
        del settings["reverse_transformer_layers_per_block"]
    return settings


def _shorten(value: Any) -> Any:
    """Return eight for four times eight, level by level: diffusers reads both alike."""
    if not isinstance(value, tuple):
        return value
    inner = tuple(map(_shorten, value))
    return inner[0] if len(set(inner)) == 1 else inner
