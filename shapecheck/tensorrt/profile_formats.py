"""Profiles as JSON, and in the words of the tools that build engines: Polygraphy, trtexec, ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.json_codec import TextFormat, decode, encode, refuse_unprintable
from shapecheck.tensorrt.profiles import BOUNDS, Profile

Tool = Literal["polygraphy", "trtexec", "ort"]
MOST_PROFILES = 64
"""In one engine, and in one file."""
_PRECISIONS = {"float16": "trt_fp16_enable", "bfloat16": "trt_bf16_enable"}
FORMAT = TextFormat(
    "shapecheck_profiles",
    "a file of profiles",
    writer="`shapecheck profile MODEL --sizes … --format json`",
    remedy="make them again",
    largest=4 * 2**20,
)


def dumps(profiles: Sequence[Profile], digest: str) -> str:
    """Return JSON text of profiles made for the contract of that digest, which `loads` reads."""
    record = {FORMAT.key: FORMAT.schema, "contract": digest, "profiles": encode(profiles)}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def loads(text: str) -> tuple[tuple[Profile, ...], str]:
    """Return the profiles in `dumps`' text, and the digest of their contract. Raises ShapecheckError on anything else.

    They may have been edited: `find_profile_mismatches` judges them.
    """
    record = FORMAT.parse(text)
    try:
        refuse_unprintable(record.get("profiles"))
        profiles = decode(tuple[Profile, ...], record.get("profiles"), "profiles")
        refuse_count(profiles)
        return profiles, decode(str, record.get("contract"), "contract")
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"damaged profiles: {error!s:.200}") from None


def refuse_count(profiles: Sequence[Profile]) -> None:
    """Raise ValueError if one engine cannot have this many profiles."""
    if not 1 <= len(profiles) <= MOST_PROFILES:
        raise ValueError(f"profiles: expected 1 to {MOST_PROFILES}, got {len(profiles)}")


def list_arguments(profiles: Sequence[Profile], tool: Tool) -> list[str]:
    """Return the options of Polygraphy's or trtexec's command line for these profiles, or ONNX Runtime's as key=value."""
    if tool == "ort":
        return [f"{key}={value}" for key, value in make_provider_options(profiles).items()]
    arguments = []
    for number, profile in enumerate(profiles):
        if tool == "trtexec" and len(profiles) > 1:
            arguments.append(f"--profile={number}")
        for bound in BOUNDS:
            if tool == "trtexec":
                arguments.append(f"--{bound}Shapes={_join_shapes([profile], bound)}")
            else:
                shapes = [(bounds.name, ",".join(map(str, getattr(bounds, bound)))) for bounds in profile.inputs]
                arguments += [f"--trt-{bound}-shapes", *(f"{name}:[{shape}]" for name, shape in shapes)]
    return arguments


def make_provider_options(profiles: Sequence[Profile]) -> Mapping[str, str]:
    """Return options of ONNX Runtime's TensorRT provider; an input named again belongs to the next profile."""
    if not profiles:
        return {}
    shapes = {f"trt_profile_{bound}_shapes": _join_shapes(profiles, bound) for bound in BOUNDS}
    return shapes | choose_precision({bounds.dtype for profile in profiles for bounds in profile.inputs})


def choose_precision(dtypes: Collection[str]) -> dict[str, str]:
    """Return the options without which that provider lets TensorRT compute in float32 alone, whatever the graph's dtypes."""
    return {option: "True" for dtype, option in _PRECISIONS.items() if dtype in dtypes}


def _join_shapes(profiles: Sequence[Profile], bound: str) -> str:
    shapes = [(bounds.name, getattr(bounds, bound)) for profile in profiles for bounds in profile.inputs]
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)
