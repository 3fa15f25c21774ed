"""Two contracts side by side: everything that differs between them, at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import show
from shapecheck.contract.records import Input, Slot

Part = Literal["model", "input", "slot", "feature", "setting"]
"""Of what: the model as a whole, one base input, one slot, one slot of a T2I-Adapter's feature, one setting of its
configuration."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two contracts, A and B, do not say alike."""

    part: Part
    name: str
    """Of the input, the slot or the setting; of the model: class, role, divisor, inputs or slots."""
    aspect: str
    """In what: shape, dtype, channels, size, …; empty where the whole is meant."""
    a: str | None
    """What A says; None where A has no such thing."""
    b: str | None


def differences(a: Contract, b: Contract) -> tuple[Difference, ...]:
    """Everything in which the contracts differ; empty exactly where they are equal.

    In the order model, base inputs, slots, features, settings; A's order of inputs and slots, then what only B has.
    """
    return (
        *_told("model", "", _whole(a), _whole(b)),
        *_members("input", a.inputs, b.inputs),
        *_members("slot", a.slots, b.slots),
        *_members("feature", a.features, b.features),
        *_told("setting", "", _settings(a), _settings(b)),
    )


def _whole(contract: Contract) -> Mapping[str, str]:
    return {"class": contract.class_name, "role": contract.role, "divisor": str(contract.divisor)}


def _settings(contract: Contract) -> Mapping[str, str]:
    config: Mapping[str, Any] = contract.config.to_json()
    return {key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in config.items()}


def _members(part: Part, a: Sequence[Input] | Sequence[Slot], b: Sequence[Input] | Sequence[Slot]) -> Iterator[Difference]:
    """Inputs or slots, by name; their order only where the names are the same."""
    left, right = _by_name(a), _by_name(b)
    if left.keys() == right.keys() and tuple(left) != tuple(right):
        yield Difference("model", f"{part}s", "order", ", ".join(left), ", ".join(right))
    for name in dict.fromkeys((*left, *right)):
        if name in left and name in right:
            yield from _told(part, name, _aspects(left[name]), _aspects(right[name]))
        else:
            yield Difference(part, name, "", *(_summary(side[name]) if name in side else None for side in (left, right)))


def _by_name(members: Sequence[Input] | Sequence[Slot]) -> Mapping[str, Input | Slot]:
    """Each under its name; a name that comes twice, as in no observed contract, is counted."""
    named: dict[str, Input | Slot] = {}
    for each in members:
        count = sum(other.name == each.name for other in named.values())
        named[f"{each.name} ({count + 1})" if count else each.name] = each
    return named


def _aspects(each: Input | Slot) -> Mapping[str, str]:
    if isinstance(each, Input):
        return {"shape": show(each.shape), "dtype": each.dtype, "argument": each.argument}
    batch, channels, *size = each.skip
    return {
        "batch": str(batch),
        "channels": str(channels),
        "size": show(tuple(size)),
        "spatial": each.spatial,
        "skip from": each.producer,
        "used by": each.up_block,
        "added in": ", ".join(f"{add.owner or 'the UNet'}: {add.function}" for add in each.adds),
    }


def _summary(each: Input | Slot) -> str:
    if isinstance(each, Input):
        return f"{show(each.shape)} {each.dtype}"
    return show(each.skip) if each.spatial == "full" else f"{show(each.skip)} {each.spatial}"


def _told(part: Part, name: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    """What differs between two tables; without a name the keys are names, else aspects of that one."""
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield Difference(part, name or key, key if name else "", a.get(key), b.get(key))
