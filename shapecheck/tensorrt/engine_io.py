"""An engine as TensorRT shows it, against the record beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shapecheck.contract.dims import Shape, show
from shapecheck.contract.mismatch import Port
from shapecheck.contract.naming import torch_name
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt.profiles import Bounds, Profile
from shapecheck.tensorrt.record import Request

DYNAMIC = -1
"""How TensorRT shows an axis that varies."""


@dataclass(frozen=True, slots=True)
class DeclaredTensor:
    """An input or output of an engine, under its own name."""

    name: str
    is_input: bool
    dtype: str
    shape: Shape = field(metadata={"limits": (DYNAMIC, 2**63 - 1)})
    """-1 where an axis varies."""
    bounds: tuple[tuple[Shape, Shape, Shape], ...]
    """Min, opt and max in each profile; for an input that varies."""


@dataclass(frozen=True, slots=True)
class DeclaredEngine:
    """What a deserialised engine says of itself."""

    name: str
    tensors: tuple[DeclaredTensor, ...]
    profiles: int

    def profile(self, number: int) -> Profile:
        """One of its profiles, in its own names."""
        varying = [each for each in self.tensors if each.is_input and DYNAMIC in each.shape]
        return Profile(tuple(Bounds(each.name, each.dtype, *each.bounds[number]) for each in varying))


def describe(trt: Any, engine: Any) -> DeclaredEngine:
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


def differences(request: Request, seen: DeclaredEngine) -> tuple[Mismatch, ...]:
    """Everything in which an engine is not what its record says; empty where they belong together."""
    if seen.name != request.contract.digest:
        cause = "the record beside it is another engine's; copy both together, or build again"
        return (
            Mismatch("engine", "the engine", f"built for {seen.name or 'no contract'}", request.contract.digest, cause=cause),
        )
    return (*_tensors(request, seen), *_profiles(request, seen))


def _tensors(request: Request, seen: DeclaredEngine) -> Iterator[Mismatch]:
    inputs = [Port(each.name, each.dtype) for each in seen.tensors if each.is_input]
    yield from request.contract.compare_inputs(inputs, request.engine_names, present="an input of the engine")
    outputs = tuple(each.name for each in seen.tensors if not each.is_input)
    if sorted(outputs) != sorted(request.outputs):
        yield Mismatch("name", "the outputs", ", ".join(outputs), ", ".join(request.outputs))


def _profiles(request: Request, seen: DeclaredEngine) -> Iterator[Mismatch]:
    if seen.profiles != len(request.profiles):
        yield Mismatch("engine", "the profiles", f"{seen.profiles}", f"{len(request.profiles)}")
        return
    ours = {theirs: name for name, theirs in request.names}
    inputs = {ours.get(each.name): each for each in seen.tensors if each.is_input}
    for number, wanted in enumerate(request.profiles):
        found = seen.profile(number).renamed(ours)
        for bounds in wanted.inputs:
            if (given := inputs.get(bounds.name)) is None:
                continue
            own = found.bounds(bounds.name)
            if (own.shapes if own else (given.shape,) * 3) != bounds.shapes:  # an input that never varies is in no profile
                has = str(own) if own else f"{show(given.shape)} only"
                yield Mismatch("range", bounds.name, f"profile {number}: {has}", f"{bounds}")
