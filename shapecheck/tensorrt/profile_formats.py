"""Profiles as JSON, and in the words of the tools that build engines: Polygraphy, trtexec, ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shapecheck.contract.dims import Shape
from shapecheck.contract.errors import ShapecheckError
from shapecheck.tensorrt.profiles import BOUNDS, Bounds, Profile

Tool = Literal["polygraphy", "trtexec", "ort"]


SCHEMA = 1


MOST_PROFILES = 64
"""In one engine, and in one file."""


_LARGEST_TEXT = 4 * 2**20


def dumps(profiles: Sequence[Profile], digest: str) -> str:
    """JSON text of profiles made for the contract of that digest; `loads` is the inverse."""
    record = {"shapecheck_profiles": SCHEMA, "contract": digest, "profiles": as_json(profiles)}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def loads(text: str) -> tuple[tuple[Profile, ...], str]:
    """The profiles in `dumps`' text, and the digest of their contract. Raises ShapecheckError on anything else.

    What is in them is not judged here: they may have been edited.
    """
    if len(text) > _LARGEST_TEXT:
        raise ShapecheckError(f"no profiles: {len(text)} characters, more than the {_LARGEST_TEXT} allowed")
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or "shapecheck_profiles" not in record:
            raise ShapecheckError(
                "no profiles: no key 'shapecheck_profiles'; `shapecheck profile MODEL --sizes … --format json` writes them"
            )
        if record["shapecheck_profiles"] != SCHEMA:
            raise ShapecheckError(f"profiles of schema {record['shapecheck_profiles']!r:.20}; this release reads {SCHEMA}")
        return from_json(record["profiles"]), str(record["contract"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ShapecheckError(f"damaged profiles: {type(error).__name__}: {error!s:.200}") from None


def as_json(profiles: Sequence[Profile]) -> list[list[dict[str, Any]]]:
    """As JSON values: a list of inputs for each profile."""
    return [
        [
            {"name": each.name, "dtype": each.dtype} | dict(zip(BOUNDS, map(list, each.shapes), strict=True))
            for each in one.inputs
        ]
        for one in profiles
    ]


def from_json(record: Any) -> tuple[Profile, ...]:
    """The inverse of `as_json`. Raises KeyError, TypeError or ValueError on anything else."""
    if not isinstance(record, list) or not 1 <= len(record) <= MOST_PROFILES:
        raise TypeError(f"expected a list of 1 to {MOST_PROFILES} profiles")
    return tuple(Profile(tuple(map(_bounds, inputs))) for inputs in record)


def arguments(profiles: Sequence[Profile], tool: Tool) -> list[str]:
    """The options that give these profiles to Polygraphy's or trtexec's command line, or to ONNX Runtime as key=value."""
    if tool == "ort":
        return [f"{key}={value}" for key, value in provider_options(profiles).items()]
    if tool == "polygraphy":
        return [word for profile in profiles for bound in BOUNDS for word in (f"--trt-{bound}-shapes", *_words(profile, bound))]
    found = []
    for number, profile in enumerate(profiles):
        found += [f"--profile={number}"] if len(profiles) > 1 else []
        found += [f"--{bound}Shapes={_joined([profile], bound)}" for bound in BOUNDS]
    return found


def provider_options(profiles: Sequence[Profile]) -> Mapping[str, str]:
    """Options of ONNX Runtime's TensorRT provider; an input named again belongs to the next profile."""
    if not profiles:
        return {}
    return {f"trt_profile_{bound}_shapes": _joined(profiles, bound) for bound in BOUNDS}


def _words(profile: Profile, bound: str) -> list[str]:
    return [f"{each.name}:[{','.join(map(str, getattr(each, bound)))}]" for each in profile.inputs]


def _joined(profiles: Sequence[Profile], bound: str) -> str:
    shapes = [(each.name, getattr(each, bound)) for profile in profiles for each in profile.inputs]
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)


def _bounds(record: Any) -> Bounds:
    name, dtype = record["name"], record["dtype"]
    if not (isinstance(name, str) and isinstance(dtype, str) and name.isprintable() and dtype.isprintable()):
        raise TypeError(f"no name or dtype: {name!r:.60}, {dtype!r:.60}")
    least, usual, most = (_shape(name, record[bound]) for bound in BOUNDS)
    return Bounds(name, dtype, least, usual, most)


def _shape(name: str, value: Any) -> Shape:
    if not isinstance(value, list) or not all(type(size) is int and 0 < size < 2**31 for size in value):
        raise TypeError(f"{name}: expected a list of sizes, got {value!r:.60}")
    return tuple(value)
