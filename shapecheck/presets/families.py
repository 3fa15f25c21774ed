"""Which well-known models a contract is one of: all that fit, none claimed falsely."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from shapecheck import presets
from shapecheck.contract import Config, Contract

_NOT_ARCHITECTURE = ("sample_size", "upcast_attention", "dropout")


def find_families(contract: Contract) -> tuple[str, ...]:
    """The presets whose architecture this is; more than one where they differ only in size, precision or training."""
    return tuple(
        name for name, known in presets.contracts().items() if extract_architecture(known) == extract_architecture(contract)
    )


def describe_families(contract: Contract) -> str:
    """The same in words: `SD2.1 (presets: sd-turbo, sd21, sd21-base)`, or `no known family`."""
    fits = find_families(contract)
    known = ", ".join(dict.fromkeys(presets.load(name).family for name in fits))
    return f"{known} (presets: {', '.join(fits)})" if fits else "no known family"


def extract_architecture(contract: Contract) -> tuple[object, ...]:
    """What two models share when one's ControlNets, exports and engines are built like the other's.

    Leaves out the native size and numeric settings; an absent setting and a false one are the same, and so are
    a number and a list of that number, and what is mirrored by default and spelt out.
    """
    config = {key: value for key, value in _settings(contract.config).items() if key not in _NOT_ARCHITECTURE}
    slots = tuple((slot.name, slot.skip, slot.producer) for slot in contract.slots)
    return contract.class_name, contract.inputs, slots, tuple(config.items())


def find_sharing(config: Mapping[str, Any], keys: Collection[str]) -> tuple[str, ...]:
    """The UNet presets with these settings of a configuration; spelt otherwise is the same, as above."""
    wanted = _kept(config, keys)
    return tuple(name for name, known in presets.contracts().items() if _kept(known.config, keys) == wanted)


def _kept(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in _settings(config).items() if key in keys}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something, each in one spelling."""
    settings = {key: told for key, value in Config(config).items() if (told := _once(value))}
    depths, upward = settings.get("transformer_layers_per_block"), settings.get("reverse_transformer_layers_per_block")
    if upward and upward == (depths[::-1] if isinstance(depths, tuple) else depths):
        del settings["reverse_transformer_layers_per_block"]
    return settings


def _once(value: Any) -> Any:
    """Eight for four times eight, level by level: diffusers reads both alike."""
    if not isinstance(value, tuple):
        return value
    inner = tuple(map(_once, value))
    return inner[0] if len(set(inner)) == 1 else inner
