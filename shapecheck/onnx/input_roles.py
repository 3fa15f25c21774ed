"""The role of each graph input: slots by naming scheme or by the sum they go into, the rest by name or by shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shapecheck.contract import Contract, Input, Slot, naming
from shapecheck.contract.naming import SHAPECHECK, Naming
from shapecheck.onnx.foreign_inputs import TEXT, TIMES, TIMESTEP, is_timestep, measure_joined
from shapecheck.onnx.reading import GraphTensor, Reading

CONDITIONS = frozenset((
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", TEXT, TIMES, "image_embeds", "hint",
    "controlnet_cond", "control_type",
))  # fmt: skip
"""What diffusers calls inputs: one of these without effect is baked into a file."""
STRENGTH = "conditioning_scale"
"""The input of a ControlNet that all its residuals are multiplied by."""
_PICTURE_CHANNELS = 3
_SYMBOLS: Mapping[str, tuple[str | None, ...]] = {
    "sample": ("batch", None, "h", "w"),
    "encoder_hidden_states": ("batch", "tokens", None),
}


@dataclass(frozen=True, slots=True)
class Roles:
    """The graph's inputs, sorted into residuals and the rest."""

    naming: Naming | None
    """Scheme of the residuals, which a UNet takes and a ControlNet emits."""
    slots: tuple[GraphTensor, ...]
    """In the order in which the graph computes their skips; those that are added to nothing last."""
    base: tuple[GraphTensor, ...]
    is_controlnet: bool
    features: tuple[GraphTensor, ...] = ()
    """Of a T2I-Adapter, by our names, which are the only ones known."""
    emitted: tuple[str, ...] = ()
    """The outputs of a ControlNet, in the order of the graph."""
    strength: float | None = None
    """A constant that a ControlNet multiplies all of them by, or a UNet all residuals that it takes."""

    @property
    def added(self) -> tuple[GraphTensor, ...]:
        return self.slots + self.features

    @property
    def sample(self) -> GraphTensor | None:
        """Return the latents: by name, else the first image that is not a residual and has other channels than a picture."""
        images = [tensor for tensor in self.base if tensor.is_image and tensor.dims]
        named = [tensor for tensor in self.base if "sample" in diffusers_names(tensor)]
        latents = [tensor for tensor in images if tensor.dims and tensor.dims[1] != _PICTURE_CHANNELS]
        return next(iter((*named, *(latents if len(images) > 1 else images))), None)

    @property
    def pictures(self) -> tuple[GraphTensor, ...]:
        """Return what a UNet takes besides the latents, if it takes no residuals: it makes them itself."""
        if self.is_controlnet or self.added:
            return ()
        return tuple(
            tensor for tensor in self.base if tensor.is_image and tensor.dims and tensor.live and tensor != self.sample
        )

    def symbols(self, tensor: GraphTensor) -> tuple[str | None, ...]:
        """Return which size of a call each axis of a base input is: batch, h, w or tokens; None for none of them."""
        rank = len(tensor.dims or ())
        symbols = _SYMBOLS.get("sample" if tensor == self.sample else diffusers_names(tensor)[0], ())
        return symbols if len(symbols) == rank else ("batch", *[None] * rank)[:rank]

    def position(self, tensor: GraphTensor) -> float | None:
        """Return the place in slot order that a name claims, mid last, or None."""
        index = self.naming.index(tensor.name) if self.naming else None
        return math.inf if index == -1 else index


@dataclass(frozen=True, slots=True)
class Matching:
    """The graph input that stands for each input and slot of a contract."""

    slots: tuple[tuple[Slot, GraphTensor | None], ...]
    """Of residuals, then of features."""
    inputs: tuple[tuple[Input, GraphTensor | None], ...]
    surplus: tuple[GraphTensor, ...]
    renamed: frozenset[str]

    @property
    def unused(self) -> tuple[GraphTensor, ...]:
        """Return inputs that are not the contract's and change nothing, if it lacks none: whoever calls it gives anything."""
        lost = [slot.name for slot, tensor in self.slots if tensor is None]
        lost += [base.name for base, tensor in self.inputs if tensor is None and base.name != STRENGTH]
        return tuple(tensor for tensor in self.surplus if not tensor.live and not lost)

    @property
    def pairs(self) -> list[tuple[Input | Slot, GraphTensor]]:
        """Return the inputs and slots of the contract that the file has."""
        pairs: list[tuple[Input | Slot, GraphTensor | None]] = [*self.inputs, *self.slots]
        return [(expected, tensor) for expected, tensor in pairs if tensor is not None]

    def list_joined(self, tensor: GraphTensor) -> tuple[str, ...]:
        """Return the inputs of the contract that a tensor stands for, if these are several."""
        names = tuple(base.name for base, own in self.inputs if own is tensor)
        return names if len(names) > 1 else ()


def diffusers_names(tensor: GraphTensor) -> tuple[str, ...]:
    """Return what diffusers calls this base input: two names for one that joins two."""
    return naming.find_ours(tensor.name)


def assign_roles(reading: Reading) -> Roles:
    """Sort a graph's inputs into slots, features and base inputs."""
    scheme = naming.detect_scheme(tensor.name for tensor in reading.inputs)
    slots, features, base = [], [], []
    for tensor in reading.inputs:
        is_named = scheme is not None and scheme.index(tensor.name) is not None
        if naming.is_feature(tensor.name):
            features.append(tensor)
        elif is_named or (tensor.is_image and tensor.adds and "sample" not in diffusers_names(tensor)):
            slots.append(tensor)
        else:
            base.append(tensor)
    slots.sort(key=lambda tensor: min(((add.depth, add.rank) for add in tensor.adds), default=(math.inf, 0)))
    images = [tensor for tensor in base if tensor.is_image and tensor.dims]
    # A ControlNet takes latents and a picture. Fewer than four outputs without those are not a ControlNet's.
    is_controlnet = not slots and not features and len(reading.outputs) >= (2 if len(images) > 1 else 4)
    ports = reading.outputs if is_controlnet else slots
    detect = naming.detect_output_scheme if is_controlnet else naming.detect_scheme
    scheme = detect(tensor.name for tensor in ports)
    # If a scheme knows only some of the names, such as mid's, it is not theirs.
    if scheme is not None and 2 * sum(scheme.index(tensor.name) is not None for tensor in ports) < len(ports):
        scheme = None
    emitted = tuple(tensor.name for tensor in reading.outputs) if is_controlnet else ()
    factors = {tensor.factor for tensor in reading.outputs} if is_controlnet else _read_factors(slots)
    strength = factors.pop() if len(factors) == 1 else None
    return Roles(scheme, tuple(slots), tuple(base), is_controlnet, tuple(features), emitted, strength)


def _read_factors(slots: list[GraphTensor]) -> set[float | None]:
    """Return what residuals are multiplied by before they are added; with None if that is no constant, or takes them away."""
    factors = [[add.factor for add in tensor.adds] for tensor in slots]
    known = [round(found[0], 9) if len(found) == 1 and found[0] > 0 else None for found in factors]
    return {*known}


def name_outputs(roles: Roles, contract: Contract) -> dict[str, str]:
    """Return what a ControlNet's file calls each slot: by a scheme, else by the order of its outputs."""
    indexes = [(slot.name, SHAPECHECK.index(slot.name)) for slot in contract.slots]
    if roles.naming is None:
        return dict(zip((name for name, _ in indexes), roles.emitted, strict=False))
    names = {
        name: roles.naming.mid if index == -1 else roles.naming.down(index) for name, index in indexes if index is not None
    }
    return {name: own for name, own in names.items() if own in roles.emitted}


def match_inputs(roles: Roles, contract: Contract) -> Matching:
    """Find the graph input that stands for each slot and base input of the contract."""
    # Slots match by name; a nameless one takes the first place that is left, in the order of the graph.
    expected_slots = contract.slots if contract.role == "unet" else ()
    places = {slot.name: math.inf if slot.name == SHAPECHECK.mid else SHAPECHECK.index(slot.name) for slot in expected_slots}
    claimed = {roles.position(tensor): tensor for tensor in roles.slots}
    nameless = [tensor for tensor in roles.slots if roles.position(tensor) is None]
    slots = {name: claimed[place] for name, place in places.items() if place is not None and place in claimed}
    slots |= dict(zip([name for name in places if name not in slots], nameless, strict=False))
    slots |= {tensor.name: tensor for tensor in roles.features if tensor.name in {slot.name for slot in contract.features}}
    renamed = {tensor.name for tensor in slots.values() if roles.naming and tensor in nameless}

    # Base inputs match by name, the others by rank and constant sizes.
    named = {name: tensor for tensor in roles.base for name in diffusers_names(tensor)}
    unmatched = [tensor for tensor in roles.base if not {base.name for base in contract.inputs} & {*diffusers_names(tensor)}]
    for base in contract.inputs:
        # What may be two inputs in one is the first of them alone if another input fits the second.
        is_second = base.name in named and base.name in diffusers_names(named[base.name])[1:]
        if is_second and any(_fits(tensor, base) for tensor in unmatched):
            del named[base.name]
    inputs: dict[str, GraphTensor | None] = {}
    for base in contract.inputs:
        stand_ins = [named[base.name]] if base.name in named else [tensor for tensor in unmatched if _fits(tensor, base)]
        if not stand_ins and base.name == TIMESTEP:  # it has many forms
            stand_ins = [tensor for tensor in unmatched if is_timestep(tensor)]
        inputs[base.name] = stand_ins[0] if stand_ins else None
        if stand_ins and stand_ins[0] in unmatched:
            unmatched.remove(stand_ins[0])
            renamed.add(stand_ins[0].name)
    if {TEXT, TIMES} <= inputs.keys() and inputs[TEXT] is inputs[TIMES] is None:
        ends = [(width,) for width in measure_joined(contract).values()]
        joined = next((tensor for tensor in unmatched if tensor.is_float and (tensor.dims or ())[1:] in ends), None)
        inputs |= {TEXT: joined, TIMES: joined}
        renamed |= {joined.name} if joined is not None else set()
    matched = [*slots.values(), *inputs.values()]
    return Matching(
        tuple((slot, slots.get(slot.name)) for slot in contract.residuals if contract.role == "unet"),
        tuple((base, inputs[base.name]) for base in contract.inputs),
        tuple(tensor for tensor in (*roles.base, *roles.added) if tensor not in matched),
        frozenset(renamed),
    )


def _fits(tensor: GraphTensor, base: Input) -> bool:
    if tensor.dims is None or len(tensor.dims) != len(base.shape) or tensor.is_float != ("float" in base.dtype):
        return False
    axes = zip(tensor.dims, base.shape, strict=True)
    return all(not isinstance(size, int) or dim.symbol is not None or size == dim.scale for size, dim in axes)
