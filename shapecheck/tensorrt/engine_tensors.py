"""Inputs, outputs and profiles of an engine as TensorRT shows them, and the comparison with the record beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import Shape, show
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.mismatch import Port, compare_inputs, compare_shapes
from shapecheck.contract.naming import torch_name
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt.profiles import Bounds, Profile
from shapecheck.tensorrt.record import BuildRequest

DYNAMIC = -1
"""The size that TensorRT shows for an axis that varies."""


@dataclass(frozen=True, slots=True)
class DeclaredTensor:
    """An input or output of an engine, under its own name."""

    name: str
    is_input: bool
    dtype: str
    shape: Shape = field(metadata={"limits": (DYNAMIC, 2**63 - 1)})
    bounds: tuple[tuple[Shape, Shape, Shape], ...]
    """Min, opt and max in each profile, if an axis of the input varies."""


@dataclass(frozen=True, slots=True)
class DeclaredEngine:
    """A deserialised engine as it describes itself."""

    name: str
    tensors: tuple[DeclaredTensor, ...]
    profiles: int

    def profile(self, number: int) -> Profile:
        varying = [port for port in self.tensors if port.is_input and DYNAMIC in port.shape]
        return Profile(tuple(Bounds(port.name, port.dtype, *port.bounds[number]) for port in varying))

    def whole_profile(self, number: int) -> Profile:
        """Return the profile with the inputs that never vary too, in the engine's order."""
        inputs = [port for port in self.tensors if port.is_input]
        shapes = [port.bounds[number] if DYNAMIC in port.shape else (port.shape,) * 3 for port in inputs]
        return Profile(tuple(Bounds(port.name, port.dtype, *three) for port, three in zip(inputs, shapes, strict=True)))


def describe_engine(trt: Any, engine: Any) -> DeclaredEngine:
    """Return what TensorRT's module shows of a deserialised engine."""
    tensors = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        is_input, shape = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT, tuple(engine.get_tensor_shape(name))
        profiles = range(engine.num_optimization_profiles if is_input and DYNAMIC in shape else 0)
        bounds = tuple(
            (tuple(least), tuple(usual), tuple(most))
            for least, usual, most in (engine.get_tensor_profile_shape(name, number) for number in profiles)
        )
        dtype = torch_name(engine.get_tensor_dtype(name).name)
        tensors.append(DeclaredTensor(name, is_input, dtype, shape, bounds))
    return DeclaredEngine(engine.name, tuple(tensors), engine.num_optimization_profiles)


def compare_model(contract: Contract, model: Contract) -> tuple[Mismatch, ...]:
    """Return everything in which the inputs of an engine's contract are not the model's; its precision does not count."""
    rules = {base.name: base.shape for base in model.inputs}
    mismatches = compare_inputs(rules, {}, [Port(base.name, dims=base.shape) for base in contract.inputs])
    if contract.role == model.role == "unet":
        geometry = Geometry(2, 17 * model.divisor, 25 * model.divisor)
        shapes = {slot.name: slot.shape_at(geometry) for slot in contract.slots}
        mismatches += compare_shapes(model.slots, geometry, shapes)
    return mismatches


def compare_engine(request: BuildRequest, declared: DeclaredEngine) -> tuple[Mismatch, ...]:
    """Return everything in which an engine is not what its record says; empty if they belong together."""
    if declared.name != request.contract.digest:
        cause = "the record beside it is another engine's; copy both together, or build again"
        actual = f"built for {declared.name or 'no contract'}"
        return (Mismatch("engine", "the engine", actual, request.contract.digest, cause=cause),)
    ports = [Port(port.name, port.dtype) for port in declared.tensors if port.is_input]
    mismatches = [*request.contract.compare_inputs(ports, request.engine_names, present="an input of the engine")]
    outputs = tuple(port.name for port in declared.tensors if not port.is_input)
    if sorted(outputs) != sorted(request.outputs):
        mismatches.append(Mismatch("name", "the outputs", ", ".join(outputs), ", ".join(request.outputs)))
    if declared.profiles != len(request.profiles):
        mismatch = Mismatch("engine", "the profiles", f"{declared.profiles}", f"{len(request.profiles)}")
        return (*mismatches, mismatch)
    ours = {theirs: name for name, theirs in request.names}
    inputs = {ours.get(port.name): port for port in declared.tensors if port.is_input}
    for number, expected in enumerate(request.profiles):
        actual_profile = declared.profile(number).renamed(ours)
        for bounds in (bounds for bounds in expected.inputs if bounds.name in inputs):
            shape, own = inputs[bounds.name].shape, actual_profile.bounds(bounds.name)
            # An input that never varies is in no profile of the engine.
            if (own.shapes if own else (shape,) * 3) != bounds.shapes:
                actual = f"profile {number}: {own or f'{show(shape)} only'}"
                mismatches.append(Mismatch("range", bounds.name, actual, f"{bounds}"))
    return tuple(mismatches)
