"""An engine without our record, as anybody builds one: the inputs of a model's contract, found in its bindings and profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError, Slot
from shapecheck.contract.dims import Shape
from shapecheck.contract.naming import SHAPECHECK, Naming, detect_output_scheme, detect_scheme, is_feature, residual_index
from shapecheck.onnx.input_roles import Roles, match_inputs
from shapecheck.onnx.reading import GraphTensor
from shapecheck.tensorrt.engine_tensors import DYNAMIC, DeclaredEngine, DeclaredTensor
from shapecheck.tensorrt.profiles import Profile, compare_bounds, sample_range
from shapecheck.tensorrt.record import EngineInterface


@dataclass(frozen=True, slots=True)
class ForeignEngine:
    """An engine of another's making beside the contract of the model that it should be."""

    interface: EngineInterface
    """Its contract has the dtypes of the engine."""
    refusals: tuple[Mismatch, ...]
    """Everything that keeps it from being called as this model."""
    faults: tuple[Mismatch, ...]
    """Everything else that is not as the model has it: sizes that are served are fewer, or a dtype holds less."""
    notes: tuple[str, ...]
    unsure: str
    """The slots that neither name nor shape tells apart; empty if there are none."""

    @property
    def has_slots(self) -> bool:
        return bool({name for name, _ in self.interface.names} & {slot.name for slot in self.interface.contract.slots})


def match_engine(declared: DeclaredEngine, contract: Contract) -> ForeignEngine:
    """Find the input of an engine that stands for each input of the contract, by name, else by shape and order.

    Precision is the engine's own.
    """
    inputs = {port.name: _as_graph_tensor(port) for port in declared.tensors if port.is_input}
    profiles = [declared.whole_profile(number) for number in range(max(declared.profiles, 1))]
    names, notes, unsure = _match_names(contract, list(inputs.values()), profiles[0])
    own = contract.with_dtypes({name: inputs[theirs].dtype for name, theirs in names.items()})
    refusals = [*own.compare_inputs(inputs.values(), contract.match_names(inputs) | names)]
    outputs, wrong = _match_outputs(own, [port for port in declared.tensors if not port.is_input])
    faults = []
    for base, expected in zip(own.inputs, contract.inputs, strict=True):
        if ("float" in base.dtype) != ("float" in expected.dtype):
            cause = "a fractional timestep is cut off" if base.name == "timestep" else ""
            faults.append(Mismatch("dtype", base.name, base.dtype, expected.dtype, cause=cause))
    ours = {theirs: name for name, theirs in names.items()}
    profiles = [profile.renamed(ours) for profile in profiles]
    known = names.keys() - {mismatch.where for mismatch in refusals}
    for number, profile in enumerate(profiles):
        found, wider = _compare_profile(own, Profile(tuple(each for each in profile.inputs if each.name in known)))
        faults += [replace(fault, observed=f"profile {number}: {fault.observed}") for fault in found]
        if wider:
            notes.append(f"profile {number} takes more sizes than the sample's at {', '.join(wider)}: only calls are checked")
    interface = EngineInterface(own, tuple(names.items()), outputs, tuple(profiles))
    return ForeignEngine(interface, (*refusals, *wrong), tuple(faults), tuple(notes), unsure)


def _as_graph_tensor(port: DeclaredTensor) -> GraphTensor:
    return GraphTensor(port.name, port.dtype, tuple(None if size == DYNAMIC else size for size in port.shape))


def _match_names(contract: Contract, inputs: Sequence[GraphTensor], profile: Profile) -> tuple[dict[str, str], list[str], str]:
    """Return the engine's name of each input of the contract that it has, how they were found, and what is not sure."""
    scheme = detect_scheme(tensor.name for tensor in inputs)
    named = tuple(tensor for tensor in inputs if scheme is not None and scheme.index(tensor.name) is not None)
    features = tuple(tensor for tensor in inputs if is_feature(tensor.name))
    others = tuple(tensor for tensor in inputs if tensor not in named + features)
    matching = match_inputs(Roles(scheme, named, others, contract.role == "controlnet", features), contract)
    names = {expected.name: tensor.name for expected, tensor in matching.pairs}
    notes = [f"the slots are named as by {scheme.origin}"] if scheme not in (None, SHAPECHECK) else []
    slots = [slot for slot, tensor in matching.slots if tensor is None and not is_feature(slot.name)]
    images, unsure = [tensor for tensor in matching.surplus if tensor.is_image], ""
    numbered = {residual_index(tensor.name): tensor.name for tensor in images}
    places = {SHAPECHECK.index(slot.name): slot.name for slot in slots}
    if None in numbered:  # the only one without a number
        numbered.setdefault(-1, numbered.pop(None))
    if 0 in numbered and len(numbered) == len(images) and numbered.keys() <= places.keys():
        names |= {places[number]: name for number, name in numbered.items()}
    else:
        shapes = {bounds.name: bounds.opt for bounds in profile.inputs}
        size = _find_size(contract, profile.renamed({theirs: name for name, theirs in names.items()}))
        found = _match_by_shape(slots, {tensor.name: shapes[tensor.name] for tensor in images}, size)
        names |= found
        chosen = [shapes[name] for name in found.values()]
        if alike := [f"{name} as {slot}" for slot, name in found.items() if chosen.count(shapes[name]) > 1]:
            unsure = (
                f"taken in the order of the engine: {', '.join(alike)}; neither name nor shape tells which is which, "
                "so that their order is unknown until values decide: compare a call with PyTorch's"
            )
    if renamed := [f"{names[rule]} is {rule}" for rule in contract.input_rules if names.get(rule) in {t.name for t in others}
                   and names[rule] != rule]:  # fmt: skip
        notes.append(f"recognised by shape or number: {', '.join(renamed)}")
    return {rule: names[rule] for rule in contract.input_rules if rule in names}, notes, unsure


def _find_size(contract: Contract, profile: Profile) -> Geometry | None:
    """Return the size that a profile is tuned for, or None if its base inputs do not show one that the model accepts."""
    try:
        size = sample_range(contract, profile).opt
        contract.require(size)
    except ShapecheckError:
        return None
    return size


def _match_by_shape(slots: Sequence[Slot], images: Mapping[str, Shape], size: Geometry | None) -> dict[str, str]:
    """Return the image for each slot: the first that is left of its whole shape, else of its channels."""
    found: dict[str, str] = {}
    for whole in (True, False):
        for slot in slots:
            expected = slot.shape_at(size) if size is not None else None
            for name, shape in images.items():
                fits = shape == expected if whole else shape[1] == slot.channels
                if fits and slot.name not in found and name not in found.values():
                    found[slot.name] = name
    return {slot.name: found[slot.name] for slot in slots if slot.name in found}


def _match_outputs(contract: Contract, outputs: Sequence[DeclaredTensor]) -> tuple[tuple[str, ...], list[Mismatch]]:
    """Return the engine's outputs, of a ControlNet in the order of its slots; and what is wrong with them."""
    names, shapes = tuple(port.name for port in outputs), {port.name: port.shape for port in outputs}
    channels: list[int | None] = [slot.channels for slot in contract.slots]
    rules = [slot.name for slot in contract.slots]
    if contract.role == "unet":
        rules, channels = ["the output"], [contract.config.get("out_channels")]
    scheme: Naming | None = detect_output_scheme(names)
    if contract.role == "controlnet" and scheme is not None and set(ordered := scheme.names(len(rules) - 1)) == set(names):
        names = ordered
    if len(names) != len(rules):
        expected = "one image" if contract.role == "unet" else f"{len(rules)} residuals"
        return names, [Mismatch("name", "the outputs", f"{len(names)}: {', '.join(names)}", expected)]
    wrong = []
    for rule, name, count in zip(rules, names, channels, strict=True):
        shape = shapes[name]
        if len(shape) != 4 or (count is not None and shape[1] not in (DYNAMIC, count)):
            observed = "×".join("?" if axis == DYNAMIC else str(axis) for axis in shape)
            wrong.append(Mismatch("channels", rule, f"{name}: {observed}", f"batch×{count}×h×w"))
    return names, wrong


def _compare_profile(contract: Contract, profile: Profile) -> tuple[list[Mismatch], list[str]]:
    """Return the inputs that refuse sizes which the sample takes, and those that take more."""
    try:
        sizes = sample_range(contract, profile)
        for geometry in sizes.geometries:
            contract.require(geometry)
    except ShapecheckError as error:
        return [Mismatch("sizes", "the profile", str(error), "sizes that the model accepts")], []
    narrow: list[Mismatch] = []
    wider = []
    for bounds in profile.inputs:
        least, _, most = expected = [geometry.shape_of(contract.input_rules[bounds.name]) for geometry in sizes.geometries]
        if not all(map(bounds.allows, expected)):
            narrow += filter(None, [compare_bounds(contract, bounds, contract.input_rules[bounds.name], sizes)])
        elif (bounds.min, bounds.max) != (least, most):
            wider.append(bounds.name)
    return narrow, wider
