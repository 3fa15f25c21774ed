"""Which graph input is what: slots by naming scheme or by the sum they end in, the rest by name or by shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shapecheck.contract import Contract, Dim, Input, Slot
from shapecheck.contract import naming as namings
from shapecheck.contract.naming import SHAPECHECK, Naming, is_feature
from shapecheck.onnx.reading import GraphTensor, Reading

_OTHERS = {
    "x": ("sample",),
    "timesteps": ("timestep",),
    "context": ("encoder_hidden_states",),
    "y": ("text_embeds", "time_ids"),  # embedded and joined before the graph
}
"""ComfyUI's names of the base inputs, and what diffusers calls them."""


_FEWEST_RESIDUALS = 4


_SYMBOLS: Mapping[str, tuple[str | None, ...]] = {
    "sample": ("batch", None, "h", "w"),
    "encoder_hidden_states": ("batch", "tokens", None),
}


@dataclass(frozen=True, slots=True)
class Roles:
    """The graph's inputs, sorted into residuals and the rest."""

    naming: Naming | None
    """Of the residuals, which a UNet takes and a ControlNet gives."""
    slots: tuple[GraphTensor, ...]
    """In the order in which the graph makes their skips; those that are added to nothing last."""
    base: tuple[GraphTensor, ...]
    is_controlnet: bool
    features: tuple[GraphTensor, ...] = ()
    """Of a T2I-Adapter, by our names, which are the only ones known."""

    @property
    def added(self) -> tuple[GraphTensor, ...]:
        """Residuals and features."""
        return self.slots + self.features

    @property
    def sample(self) -> GraphTensor | None:
        """The latents: by name, else the only image that is no residual."""
        images = [each for each in self.base if each.is_image and each.dims]
        return next((each for each in self.base if "sample" in roles_of(each)), images[0] if len(images) == 1 else None)

    def symbols(self, each: GraphTensor) -> tuple[str | None, ...]:
        """Which size of a call each axis of a base input is: of batch, h, w, tokens; None for none of them."""
        rank = len(each.dims or ())
        known = _SYMBOLS.get("sample" if each == self.sample else roles_of(each)[0], ())
        return known if len(known) == rank else ("batch", *[None] * rank)[:rank]

    def position(self, each: GraphTensor) -> float | None:
        """The place in slot order that a name claims, mid last; None where it claims none."""
        index = self.naming.index(each.name) if self.naming else None
        return math.inf if index == -1 else index


@dataclass(frozen=True, slots=True)
class Matching:
    """Which graph input stands for what a contract wants."""

    slots: tuple[tuple[Slot, GraphTensor | None], ...]
    """Of residuals, then of features."""
    inputs: tuple[tuple[Input, GraphTensor | None], ...]
    surplus: tuple[GraphTensor, ...]
    renamed: frozenset[str]

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Inputs of the contract that were found: the contract's name, and the file's."""
        inputs = [(own.name, each.name) for own, each in self.inputs if each is not None]
        return (*inputs, *((own.name, each.name) for own, each in self.slots if each is not None))


def roles_of(each: GraphTensor) -> tuple[str, ...]:
    """What diffusers calls this base input; two names for one that joins two."""
    return _OTHERS.get(each.name, (each.name,))


def sort_out(reading: Reading) -> Roles:
    """Sort a graph's inputs."""
    naming = namings.detect(each.name for each in reading.inputs)
    features = tuple(each for each in reading.inputs if is_feature(each.name))
    slots = [each for each in reading.inputs if each not in features and _is_slot(each, naming)]
    slots.sort(key=lambda each: min((add.rank for add in each.adds), default=math.inf))
    emits = not slots and not features and len(reading.outputs) >= _FEWEST_RESIDUALS
    base = tuple(each for each in reading.inputs if each not in slots and each not in features)
    is_controlnet = emits or any(each.name == "controlnet_cond" for each in base)
    if is_controlnet:
        naming = namings.detect(each.name for each in reading.outputs)
    return Roles(naming, tuple(slots), base, is_controlnet, features)


def match(roles: Roles, contract: Contract) -> Matching:
    """Give every slot and base input of the contract the graph input that stands for it."""
    slots = _match_slots(roles, contract.slots if contract.role == "unet" else ())
    slots |= {each.name: each for each in roles.features if each.name in {slot.name for slot in contract.features}}
    inputs, renamed = _match_inputs(roles.base, contract.inputs)
    taken = [*slots.values(), *inputs.values()]
    if roles.naming:
        renamed += [each.name for each in slots.values() if each in roles.slots and roles.position(each) is None]
    return Matching(
        tuple((slot, slots.get(slot.name)) for slot in contract.residuals if contract.role == "unet"),
        tuple((each, inputs.get(each.name)) for each in contract.inputs),
        tuple(each for each in (*roles.base, *roles.added) if each not in taken),
        frozenset(renamed),
    )


def _is_slot(each: GraphTensor, naming: Naming | None) -> bool:
    if naming is not None and naming.index(each.name) is not None:
        return True
    return each.is_image and bool(each.adds) and "sample" not in roles_of(each)


def _match_slots(roles: Roles, slots: Iterable[Slot]) -> dict[str, GraphTensor]:
    """By name; what no name tells takes the places that are left, in the order of the graph."""
    claimed = {roles.position(each): each for each in roles.slots}
    places = {slot.name: math.inf if slot.name == SHAPECHECK.mid else SHAPECHECK.index(slot.name) for slot in slots}
    matched = {name: claimed[place] for name, place in places.items() if place is not None and place in claimed}
    nameless = [each for each in roles.slots if roles.position(each) is None]
    return matched | dict(zip((name for name in places if name not in matched), nameless, strict=False))


def _match_inputs(base: Sequence[GraphTensor], wanted: Iterable[Input]) -> tuple[dict[str, GraphTensor], list[str]]:
    """By name; what remains by rank and constant sizes, with the names of those."""
    matched = {role: each for each in base for role in roles_of(each)}
    left = [each for each in base if not {want.name for want in wanted} & set(roles_of(each))]
    renamed = []
    for want in wanted:
        stand_in = next((each for each in left if want.name not in matched and _fits(each, want)), None)
        if stand_in is not None:
            left.remove(stand_in)
            matched[want.name] = stand_in
            renamed.append(stand_in.name)
    return {want.name: matched[want.name] for want in wanted if want.name in matched}, renamed


def _fits(each: GraphTensor, wanted: Input) -> bool:
    if each.dims is None or len(each.dims) != len(wanted.shape) or each.is_float != ("float" in wanted.dtype):
        return False
    return all(_may_be(declared, dim) for declared, dim in zip(each.dims, wanted.shape, strict=True))


def _may_be(declared: int | str | None, dim: Dim) -> bool:
    return not isinstance(declared, int) or dim.symbol is not None or declared == dim.scale
