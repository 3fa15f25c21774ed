"""Profiles as JSON, and in the words of the tools that build engines: Polygraphy, trtexec, ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.json_codec import TextFormat, decode, encode, refuse_unprintable
from shapecheck.tensorrt.profiles import BOUNDS, Profile

Tool = Literal["polygraphy", "trtexec", "ort"]


MOST_PROFILES = 64
"""In one engine, and in one file."""


_FORMAT = TextFormat(
    "shapecheck_profiles",
    "a file of profiles",
    writer="`shapecheck profile MODEL --sizes … --format json`",
    remedy="make them again",
    largest=4 * 2**20,
)


def dumps(profiles: Sequence[Profile], digest: str) -> str:
    """Return JSON text of profiles made for the contract of that digest, which `loads` reads."""
    record = {_FORMAT.key: _FORMAT.schema, "contract": digest, "profiles": encode(profiles)}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def loads(text: str) -> tuple[tuple[Profile, ...], str]:
    """The profiles in `dumps`' text, and the digest of their contract. Raises ShapecheckError on anything else.

    What is in them is not judged here: they may have been edited.
    """
    record = _FORMAT.parse(text)
    try:
        refuse_unprintable(record.get("profiles"))
        profiles = decode(tuple[Profile, ...], record.get("profiles"), "profiles")
        refuse_count(profiles)
        return profiles, decode(str, record.get("contract"), "contract")
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"damaged profiles: {error!s:.200}") from None


def refuse_count(profiles: Sequence[Profile]) -> None:
    """Raise ValueError if these are not as many profiles as an engine has."""
    if not 1 <= len(profiles) <= MOST_PROFILES:
        raise ValueError(f"profiles: expected 1 to {MOST_PROFILES}, got {len(profiles)}")


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
