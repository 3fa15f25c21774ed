"""An engine as TensorRT shows it, against the record beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shapecheck.contract.contract import dtypes_of
from shapecheck.contract.dims import Shape, show
from shapecheck.contract.records import Mismatch
from shapecheck.tensorrt.profiles import Bounds, Profile
from shapecheck.tensorrt.record import Request

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}
"""From TensorRT's names of element types to PyTorch's."""


DYNAMIC = -1
"""How TensorRT shows an axis that varies."""


@dataclass(frozen=True, slots=True)
class SeenTensor:
    """An input or output of an engine, under its own name."""

    name: str
    is_input: bool
    dtype: str
    shape: Shape
    """-1 where an axis varies."""
    bounds: tuple[tuple[Shape, Shape, Shape], ...]
    """Min, opt and max in each profile; for an input that varies."""


@dataclass(frozen=True, slots=True)
class SeenEngine:
    """What a deserialised engine says of itself."""

    name: str
    tensors: tuple[SeenTensor, ...]
    profiles: int

    def profile(self, number: int) -> Profile:
        """One of its profiles, in its own names."""
        varying = [each for each in self.tensors if each.is_input and DYNAMIC in each.shape]
        return Profile(tuple(Bounds(each.name, each.dtype, *each.bounds[number]) for each in varying))


def shown(trt: Any, engine: Any) -> dict[str, Any]:
    """What TensorRT's module shows of a deserialised engine, as JSON values."""
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    tensors = [_shown_tensor(trt, engine, name) for name in names]
    return {"name": engine.name, "tensors": tensors, "profiles": engine.num_optimization_profiles}


def _shown_tensor(trt: Any, engine: Any, name: str) -> dict[str, Any]:
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    shape = list(engine.get_tensor_shape(name))
    profiles = range(engine.num_optimization_profiles if is_input and DYNAMIC in shape else 0)
    bounds = [[list(bound) for bound in engine.get_tensor_profile_shape(name, number)] for number in profiles]
    dtype = engine.get_tensor_dtype(name).name
    return {"name": name, "is_input": is_input, "dtype": dtype, "shape": shape, "bounds": bounds}


def seen_from(record: Mapping[str, Any]) -> SeenEngine:
    """The inverse of `shown`, whichever process called it."""
    tensors = tuple(
        SeenTensor(
            each["name"],
            each["is_input"],
            DTYPES.get(each["dtype"], each["dtype"].lower()),
            tuple(each["shape"]),
            tuple((tuple(least), tuple(usual), tuple(most)) for least, usual, most in each["bounds"]),
        )
        for each in record["tensors"]
    )
    return SeenEngine(record["name"], tensors, record["profiles"])


def differences(request: Request, seen: SeenEngine) -> tuple[Mismatch, ...]:
    """Everything in which an engine is not what its record says; empty where they belong together."""
    if seen.name != request.contract.digest:
        cause = "the record beside it is another engine's; copy both together, or build again"
        return (
            Mismatch("engine", "the engine", f"built for {seen.name or 'no contract'}", request.contract.digest, cause=cause),
        )
    return (*_tensors(request, seen), *_profiles(request, seen))


def _tensors(request: Request, seen: SeenEngine) -> Iterator[Mismatch]:
    names, dtypes = request.engine_names, dtypes_of(request.contract)
    inputs = {each.name: each for each in seen.tensors if each.is_input}
    for ours, theirs in names.items():
        if theirs not in inputs:
            yield Mismatch("missing", ours, "no such input of the engine", theirs)
        elif inputs[theirs].dtype != dtypes[ours]:
            yield Mismatch("dtype", ours, inputs[theirs].dtype, dtypes[ours])
    for surplus in inputs.keys() - set(names.values()):
        yield Mismatch("surplus", surplus, "an input of the engine", "no such input")
    outputs = tuple(each.name for each in seen.tensors if not each.is_input)
    if sorted(outputs) != sorted(request.outputs):
        yield Mismatch("name", "the outputs", ", ".join(outputs), ", ".join(request.outputs))


def _profiles(request: Request, seen: SeenEngine) -> Iterator[Mismatch]:
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
