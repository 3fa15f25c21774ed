"""Base inputs that a file takes in another form than its model: the timestep, and one tensor that joins two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from shapecheck.contract import Contract, Dim
from shapecheck.contract.mismatch import Port

TIMESTEP, TEXT, TIMES = "timestep", "text_embeds", "time_ids"
_HALVES = {
    "float16": "timesteps in float16, in which whole ones are exact and fractions are not",
    "bfloat16": "timesteps in bfloat16, in which those above 256 are not exact",
}


def is_timestep(port: Port) -> bool:
    """Return whether a tensor has a form that files take the timestep in: one number, or one for each row, of any type."""
    is_number = "int" in port.dtype or "float" in port.dtype
    return is_number and port.dims is not None and len(port.dims) < 2


def is_shared(dims: Sequence[object] | None) -> bool:
    """Return whether a timestep of these dimensions is one number for all rows of a batch."""
    return dims is not None and tuple(dims) in ((), (1,))


def adapt_timestep(contract: Contract, port: Port, batch: object = None, taken_as: str = "") -> Contract:
    """Return the contract with the timestep in the type and shape that a file takes it in of this `batch`.

    `taken_as` is the type that it computes with the timestep in.
    """
    if not is_timestep(port):
        return contract
    dtype = taken_as if taken_as in _HALVES else port.dtype
    shape = tuple(Dim(None, 1) for _ in port.dims or ()) if is_shared(port.dims) and (batch != 1 or not port.dims) else None
    return replace(
        contract,
        inputs=tuple(
            replace(base, dtype=dtype, shape=base.shape if shape is None else shape) if base.name == TIMESTEP else base
            for base in contract.inputs
        ),
    )


def describe_timestep(port: Port, expected: str, batch: int | None, taken_as: str = "") -> tuple[str, ...]:
    """Return in what a timestep is narrower than the model's, whose type is `expected`; `batch` is what the file fixes."""
    dtype, limits = taken_as if taken_as in _HALVES else port.dtype, []
    if "int" in dtype and "int" not in expected:
        limits.append(f"whole timesteps ({dtype})")
    elif dtype in _HALVES and dtype != expected:
        limits.append(_HALVES[dtype])
    if is_shared(port.dims) and batch != 1:
        limits.append("one timestep for all rows of a batch")
    return tuple(limits)


def measure_joined(contract: Contract) -> dict[str, int]:
    """Return the widths that a tensor of SDXL's pooled text and size numbers may have, by how the numbers are in it.

    ComfyUI and Stability's own code give them `embedded`, as cosines and sines; others `plain`. Empty for other models.
    """
    rules, width = {base.name: base.shape for base in contract.inputs}, contract.config.get("addition_time_embed_dim")
    if not {TEXT, TIMES} <= rules.keys() or not isinstance(width, int):
        return {}
    text, numbers = (math.prod(dim.scale for dim in rules[name][1:]) for name in (TEXT, TIMES))
    return {"embedded": text + numbers * width, "plain": text + numbers}
