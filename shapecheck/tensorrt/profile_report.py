"""Profiles as a table, as JSON, or as the options of the tools that build engines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from shapecheck.contract import Contract, Geometry, show
from shapecheck.report.tables import fact_list, heading, table
from shapecheck.tensorrt import profile_formats as forms
from shapecheck.tensorrt.profile_formats import Tool
from shapecheck.tensorrt.profiles import Profile, Range, range_of


def told(contract: Contract, profiles: Sequence[Profile], names: dict[str, str]) -> str:
    """For a person. `names` says what the profiles call the contract's inputs."""
    facts = [("contract", contract.digest), ("of", contract.header.source or contract.class_name)]
    parts = [fact_list(facts, "human")]
    for number, profile in enumerate(profiles):
        sizes = range_of(contract, profile.renamed({theirs: ours for ours, theirs in names.items()}))
        rows = [(each.name, each.dtype, *map(show, each.shapes)) for each in profile.inputs]
        parts += [heading(f"Profile {number}: {in_words(sizes, contract.header.vae_factor)}", "human")]
        parts += [table(rows, ("input", "dtype", "min", "opt", "max"), "human")]
    return "\n\n".join(parts) + "\n"


def as_json(contract: Contract, profiles: Sequence[Profile]) -> str:
    """For machines, and for `shapecheck build --profile`."""
    return forms.dumps(profiles, contract.digest)


def for_tool(profiles: Sequence[Profile], tool: Tool, form: str) -> str:
    """Options of a tool: for a shell, or as a JSON list of arguments; for ONNX Runtime as key=value, or a JSON object."""
    if form == "json":
        value = dict(forms.provider_options(profiles)) if tool == "ort" else forms.arguments(profiles, tool)
        return json.dumps(value, indent=1) + "\n"
    if tool == "ort":
        return "\n".join(forms.arguments(profiles, tool)) + "\n"
    return " \\\n".join(_lines(forms.arguments(profiles, tool))) + "\n"


def in_words(sizes: Range, vae_factor: int) -> str:
    """`512×512 … 768×768 … 1024×1024 pixels, batch 1 … 2 … 4`, and the tokens where they are not the usual 77."""

    def varied(texts: Sequence[str]) -> str:
        return texts[0] if len(set(texts)) == 1 else " … ".join(texts)

    pixels = varied([in_pixels(each, vae_factor) for each in sizes.geometries])
    tokens = varied([str(each.tokens) for each in sizes.geometries])
    batch = varied([str(each.batch) for each in sizes.geometries])
    return f"{pixels} pixels, batch {batch}" + (f", {tokens} tokens" if tokens != "77" else "")


def in_pixels(geometry: Geometry, vae_factor: int) -> str:
    """Width × height."""
    return f"{geometry.width * vae_factor}×{geometry.height * vae_factor}"


def _lines(words: Sequence[str]) -> list[str]:
    """One option a line, with its values."""
    lines: list[str] = []
    for word in map(shlex.quote, words):
        if word.startswith("--") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines
